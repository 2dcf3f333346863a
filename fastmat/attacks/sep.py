"""Sep-Attack: both modalities attacked on their own, each away from its clean embedding (baseline of Co-Attack,
Zhang et al., ACM MM 2022)."""

from __future__ import annotations

from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.fusion import KLFusedFromClean, plan_of
from fastmat.attacks.objectives import KLFromClean
from fastmat.attacks.pgd import PGD
from fastmat.attacks.search import check_steps
from fastmat.attacks.word_substitution import WordSubstitution
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.text.candidates import CandidateSource
from fastmat.text.encoded import Representation
from fastmat.types import AttackContext, Batch, ThreatModel


class SepAttack(Attack):
    """Image: PGD on KL(softmax(clean embedding) || softmax(embedding)). Text: substitution by the largest KL.

    steps 10, step_size 1.25 eps/steps as in the published code. representation: what both KLs compare: "embeds" for
    CLIP; for ALBEF "cls", the un-projected class tokens of both encoders, or "fusion", the class token that image and
    text fuse to (each modality is attacked beside the clean other one; an image without captions stays at its start).
    Raises UserError without a step, with a negative step size, or for a model that has no such representation.
    """

    official = Quirks.official(text_max_length=30)

    def __init__(
        self,
        *,
        threat: ThreatModel,
        candidates: CandidateSource,
        steps: int = 10,
        step_size: float | None = None,
        representation: Representation = "embeds",
        beam: int = 1,
        quirks: Quirks | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        check_steps(steps, step_size)  # before dividing by it
        self.image = PGD(
            threat=threat,
            objective=KLFusedFromClean() if representation == "fusion" else KLFromClean(representation=representation),
            steps=steps,
            step_size=1.25 * threat.eps / steps if step_size is None else step_size,
            quirks=quirks,
        )
        self.words = WordSubstitution(
            candidates=candidates,
            max_words=threat.max_words,
            choice="kl",
            importance=representation,
            compare=representation,
            beam=beam,
            quirks=quirks,
        )

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        texts = self.words.search(model, plan_of(self.words, model, batch), None)
        images, _ = self.image.run(model, batch, context, draws)
        return images, texts
