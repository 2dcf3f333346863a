"""Perturbations of captions, as an attack value like any other: the 16 of Qiu et al. (arXiv 2212.08044).

Six of characters (nlpaug), five of words (EDA and AEDA), five of sentences, for which they took fairseq's translators
and Styleformer; here any translators, and a language model that is told the style. They drew a word or sentence again,
up to 100 times, until a sentence encoder found it alike; here nothing is drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fastmat.augment.eda import OPERATIONS
from fastmat.augment.offline import Request
from fastmat.errors import UserError
from fastmat.perturbations import characters
from fastmat.perturbations.base import Perturbation, chosen
from fastmat.quirks import Quirks
from fastmat.text.candidates import Found
from fastmat.text.lexicon import Lexicon
from fastmat.types import Batch, ThreatModel

SEVERITIES = 7
STEP = 0.05  # of the words, per severity (published)
WORDS = {"synonym": "synonym", "word_insert": "insert", "word_swap": "swap", "word_delete": "delete"}
PUNCTUATION = (".", ",", "!", "?", ";", ":")
STYLES = {
    "formal": "in formal language, as in an official report",
    "casual": "in casual language, as to a friend",
    "passive": "in the passive voice",
    "active": "in the active voice",
}
PROMPT = (
    "Say the following image caption {style}. Keep everything that it says about the picture, add nothing, and answer "
    "with the new caption alone.\nCaption: {{caption}}\nIn other words:"
)
KINDS = (*characters.KINDS, *WORDS, "punctuation", *STYLES, "back_translation")


class TextPerturbation(Perturbation):
    """Captions alone, as people and machines write them; the images stay.

    kind: of characters keyboard, ocr, char_insert, char_replace, char_swap, char_delete; of words synonym, word_insert,
        word_swap, word_delete, punctuation; of sentences formal, casual, passive, active, back_translation.
    severity: 1 to 7, a twentieth of the words each; those of sentences have one alone.
    lexicon: file of synonyms, as for the lexicon of candidates, for synonym and word_insert.
    model: language model that rewrites (folder or hub id), for formal, casual, passive and active.
    there, back: translators, for back_translation.
    Raises UserError for another kind or severity, and for what a kind needs and is not given or installed.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        kind: str,
        severity: int = 1,
        lexicon: Path | None = None,
        model: str | None = None,
        there: str | None = None,
        back: str | None = None,
        seed: int = 0,
    ) -> None:
        self.kind = chosen(kind, KINDS)
        self.of_sentences = kind in STYLES or kind == "back_translation"
        levels = 1 if self.of_sentences else SEVERITIES
        super().__init__(threat=threat, severity=severity, severities=levels, seed=seed)
        self.model, self.there, self.back = model, there, back
        needed: dict[str, object] = {"lexicon": lexicon} if kind in ("synonym", "word_insert") else {}
        needed |= {"model": model} if kind in STYLES else {}
        needed |= {"there": there, "back": back} if kind == "back_translation" else {}
        for name, value in needed.items():
            if value is None:
                raise UserError(f"kind '{kind}' needs {name}; set it")
        self.lexicon = None if lexicon is None or not needed else Lexicon(path=lexicon)
        self.augmenter = characters.augmenter(kind, STEP * severity) if kind in characters.KINDS else None

    def perturb(self, batch: Batch) -> tuple[Tensor, tuple[str, ...]]:
        place = KINDS.index(self.kind)
        owners, index = batch.txt2img.tolist(), batch.index.tolist()
        draws = [self.generator(place, index[image], owners[:t].count(image)) for t, image in enumerate(owners)]
        if self.of_sentences:
            return batch.images, self.rewritten(batch.texts, draws)
        synonyms: Sequence[Found] = [{} for _ in batch.texts]
        if self.lexicon is not None:
            synonyms = self.lexicon(batch.texts, quirks=Quirks())
        found = zip(batch.texts, synonyms, draws, strict=True)
        return batch.images, tuple(self.changed(text, own, rng) for text, own, rng in found)

    def changed(self, caption: str, synonyms: Found, rng: np.random.Generator) -> str:
        """One caption, its characters or words perturbed."""
        if self.augmenter is not None:
            return characters.augmented(self.augmenter, caption, rng)
        words, share = caption.split(" "), STEP * self.severity
        if self.kind == "punctuation":
            return " ".join(punctuated(words, share, rng))
        return " ".join(OPERATIONS[WORDS[self.kind]](words, synonyms, rng, alpha=share))

    def rewritten(self, captions: Sequence[str], draws: Sequence[np.random.Generator]) -> tuple[str, ...]:
        """One by one, so that a caption does not depend on its batch; one that nothing was made of stays."""
        seeds = [int(rng.integers(2**32)) for rng in draws]
        requests = [
            Request(image_id="", caption=caption, load=no_image, copy=0, seed=seed)
            for caption, seed in zip(captions, seeds, strict=True)
        ]
        made = [self.rewriter([request])[0] for request in requests]
        return tuple(new if isinstance(new, str) and new else old for new, old in zip(made, captions, strict=True))

    @cached_property
    def rewriter(self) -> Callable[[Sequence[Request]], Sequence[object]]:
        """Loaded when the first caption is read."""
        if self.kind == "back_translation":
            from fastmat.augment.back_translation import BackTranslation

            assert self.there is not None and self.back is not None
            return BackTranslation(there=self.there, back=self.back)
        from fastmat.augment.rewrite import Rewrite

        assert self.model is not None
        return Rewrite(model=self.model, prompt=PROMPT.format(style=STYLES[self.kind]))


def punctuated(words: Sequence[str], share: float, rng: np.random.Generator) -> list[str]:
    """A mark before some words: 1 to `share` of them and one more, drawn evenly (AEDA, Karimi et al., 2021)."""
    count = min(len(words), int(rng.integers(1, int(share * len(words) + 1) + 1)))
    before = set(rng.permutation(len(words))[:count].tolist())
    made = []
    for place, word in enumerate(words):
        made += [PUNCTUATION[int(rng.integers(len(PUNCTUATION)))], word] if place in before else [word]
    return made


def no_image() -> Image.Image:
    raise AssertionError("no generator of captions from captions looks at the image")
