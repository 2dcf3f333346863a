"""BERT-Attack on captions (Li et al., EMNLP 2020), in the form that Co-Attack and SGA gave it.

Switchable quirks: `candidate_row_offset`, `append_sep`, `text_max_length`, `round_trip`, `blanks_in_candidates`,
`case_sensitive_filters`, `raw_images`.
"""

from __future__ import annotations

from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.fusion import plan_of
from fastmat.attacks.word_substitution import Choice, WordSubstitution
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.text.candidates import CandidateSource
from fastmat.text.encoded import Representation
from fastmat.types import AttackContext, Batch, ThreatModel


class BertAttack(Attack):
    """Text only; `threat.max_words` is the budget.

    choice: "cosine" (default) takes the substitute farthest from the clean image of the caption (SGA's first step);
        "kl" the one farthest from the clean caption (Co-Attack, Sep-Attack), without looking at the image.
    representation: where importance and KL are measured; None: "features" for "cosine", "embeds" for "kl", as
        published for CLIP. BERT towers were attacked on "cls" or "tokens"; "fusion" (with "kl") is a fusion model's
        first token, and does look at the image.
    candidates: what proposes substitutes. beam: texts per caption that are followed (`WordSubstitution`).
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        candidates: CandidateSource,
        choice: Choice = "cosine",
        representation: Representation | None = None,
        beam: int = 1,
        quirks: Quirks | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        representation = representation or ("features" if choice == "cosine" else "embeds")
        self.words = WordSubstitution(
            candidates=candidates,
            max_words=threat.max_words,
            choice=choice,
            importance=representation,
            compare=representation,
            beam=beam,
            quirks=quirks,
        )

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        plan = plan_of(self.words, model, batch)
        guide = None
        if self.words.choice == "cosine":
            guide = model.encode_image(batch.images).features.detach()[batch.txt2img]
        return batch.images, self.words.search(model, plan, guide)
