"""BERT-Attack on captions (Li et al., EMNLP 2020), in the form that Co-Attack and SGA gave it.

Switchable quirks: `candidate_row_offset`, `append_sep`, `text_max_length`, `round_trip`, `blanks_in_candidates`,
`case_sensitive_filters`.
"""

from __future__ import annotations

from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.word_substitution import Choice, WordSubstitution
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.text.encoded import Representation
from fastmat.text.mlm import MaskedLanguageModel
from fastmat.types import AttackContext, Batch, ThreatModel


class BertAttack(Attack):
    """Text only; `threat.max_words` is the budget.

    choice: "cosine" (default) takes the substitute farthest from the clean image of the caption (SGA's first step);
        "kl" the one farthest from the clean caption (Co-Attack, Sep-Attack), without looking at the image.
    representation: where importance and KL are measured; None: "features" for "cosine", "embeds" for "kl", as
        published for CLIP. BERT towers were attacked on "cls" or "tokens".
    top_k, threshold: candidates per word and their least logit; 10 and 0.3 are Co-Attack's and SGA's.
    chunk: texts per forward.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        mlm: MaskedLanguageModel,
        choice: Choice = "cosine",
        representation: Representation | None = None,
        top_k: int = 10,
        threshold: float = 0.3,
        quirks: Quirks | None = None,
        chunk: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        representation = representation or ("features" if choice == "cosine" else "embeds")
        self.words = WordSubstitution(
            mlm=mlm,
            max_words=threat.max_words,
            choice=choice,
            importance=representation,
            compare=representation,
            top_k=top_k,
            threshold=threshold,
            quirks=quirks,
            chunk=chunk,
        )

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        plan = self.words.plan(model, batch.texts)
        guide = None
        if self.words.choice == "cosine":
            guide = model.encode_image(batch.images).features.detach()[batch.txt2img]
        return batch.images, self.words.search(model, plan, guide)
