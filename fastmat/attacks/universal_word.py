"""One word for all captions: where each caption takes it, and which word it is.

The place is C-PGC's: the word whose masking moves the surrogate's caption feature most. Its word is the one whose token
embedding lies nearest to what a generator was trained to give. Here the words of a vocabulary are judged themselves, in
captions, by the same objective: no token embedding is needed, and what is judged is what will be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.attacks.base import text_features
from fastmat.attacks.draws import Draws
from fastmat.attacks.universal_contrast import Corpus, contrast, farthest
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.text.encoded import EncodedTexts
from fastmat.text.spelling import Speller
from fastmat.text.words import is_stop_word, replaced

UNKNOWN = "[UNK]"  # what the release masks a word with
CHUNK = 256  # texts per forward


def with_word(model: VisionLanguageModel, texts: Sequence[str], word: str) -> tuple[str, ...]:
    """The captions with `word` in the place of their most important one; captions of stop words alone stay."""
    places = most_important(model, texts)
    return tuple(
        text if place is None else replaced(text.split(" "), place, word)
        for text, place in zip(texts, places, strict=True)
    )


@torch.no_grad()
def most_important(model: VisionLanguageModel, texts: Sequence[str]) -> list[int | None]:
    """For each caption (split on blanks) the word of the largest KL(softmax(clean) || softmax(masked)) of the unit
    features, the first of equals; None where all are stop words or have no letter or digit."""
    variants: list[str] = []
    owner: list[int] = []
    place: list[int] = []
    for n, text in enumerate(texts):
        words = text.split(" ")
        for i, word in enumerate(words):
            if any(map(str.isalnum, word)) and not is_stop_word(word):
                variants.append(replaced(words, i, UNKNOWN))
                owner.append(n)
                place.append(i)
    best: list[int | None] = [None] * len(texts)
    if not variants:
        return best
    # Texts of equal ids share a row of this table, so that equal importance is equal to the last bit.
    speller = Speller(model)
    read = [speller.ids(text.split(" ")) for text in (*texts, *variants)]
    rows = EncodedTexts(model, parts=("features",), length=speller.max_length)(read)["features"]
    clean, masked = rows[: len(texts)], rows[len(texts) :]
    target = clean[torch.tensor(owner, device=clean.device)].softmax(1)
    importance = F.kl_div(masked.log_softmax(1), target, reduction="none").sum(1).tolist()
    highest = [float("-inf")] * len(texts)
    for n, i, value in zip(owner, place, importance, strict=True):
        if value > highest[n]:
            best[n], highest[n] = i, value
    return best


@torch.no_grad()
def choose_word(
    model: VisionLanguageModel,
    corpus: Corpus,
    words: Sequence[str],
    draws: Draws,
    *,
    n_captions: int,
    targets: int,
    temperature: float,
    alpha: float,
) -> str:
    """The word of the largest mean objective over `n_captions` captions drawn from the corpus, the first of equals.

    Costs len(words) * n_captions text encodings. Raises UserError without words, or when no drawn caption has a place.
    """
    if not words:
        raise UserError("the captions to fit on have no word to choose from; set vocabulary")
    device = corpus.texts.device
    every = torch.arange(len(corpus.captions), device=device)
    chosen = draws.uniform("captions", every, ()).argsort()[:n_captions]
    places = most_important(model, [corpus.captions[t] for t in chosen.tolist()])
    kept = [n for n, place in enumerate(places) if place is not None]
    if not kept:
        raise UserError(f"none of {len(places)} captions to fit on has a word that may be replaced")
    chosen = chosen[kept]
    open_words = [(corpus.captions[t].split(" "), places[n]) for t, n in zip(chosen.tolist(), kept, strict=True)]

    clean, images = corpus.texts[chosen], corpus.txt2img[chosen]
    drawn = corpus.drawn(draws, "text_targets", chosen, targets)
    which = farthest(clean, corpus.images[drawn], corpus.group[images], corpus.group[drawn])
    other = corpus.image_of(drawn.gather(1, which[:, None])[:, 0])
    own = corpus.image_of(images)

    def score(word: str) -> Tensor:
        texts = [replaced(caption, place, word) for caption, place in open_words if place is not None]
        features = torch.cat([text_features(model, texts[n : n + CHUNK]) for n in range(0, len(texts), CHUNK)])
        return contrast(features, clean, own, other, temperature=temperature, alpha=alpha).mean()

    return words[int(torch.stack([score(word) for word in words]).argmax())]


def frequent_words(captions: Sequence[str], count: int) -> tuple[str, ...]:
    """The `count` most frequent words of letters alone that are no stop words, in lower case; equals by the alphabet.

    >>> frequent_words(["A dog and a red ball .", "Two dogs , one Dog"], 3)
    ('dog', 'ball', 'dogs')
    """
    seen = Counter(word.lower() for caption in captions for word in caption.split())
    words = [word for word in seen if word.isalpha() and not is_stop_word(word)]
    return tuple(sorted(words, key=lambda word: (-seen[word], word))[:count])


def read_words(path: Path) -> tuple[str, ...]:
    """The words of a text file, one a line. Raises UserError naming the file and the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"vocabulary {path} cannot be read ({error}); give a text file, one word a line") from error
    words = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    for word in words:
        if len(word.split()) > 1:
            raise UserError(f"vocabulary {path} has {word!r}, which is several words; write one word a line")
    if not words:
        raise UserError(f"vocabulary {path} has no word; write one word a line")
    return words
