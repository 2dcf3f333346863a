"""Sep-Attack: both modalities attacked on their own, each away from its clean embedding (baseline of Co-Attack,
Zhang et al., ACM MM 2022)."""

from __future__ import annotations

from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.objectives import KLFromClean
from fastmat.attacks.search import ascend, random_start
from fastmat.attacks.word_substitution import WordSubstitution
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.text.encoded import Representation
from fastmat.text.mlm import MaskedLanguageModel
from fastmat.types import AttackContext, Batch, ThreatModel


class SepAttack(Attack):
    """Image: PGD on KL(softmax(clean embedding) || softmax(embedding)). Text: substitution by the largest KL.

    steps 10, step_size 1.25 eps/steps as in the published code. representation: what the text's KL compares
    ("embeds" for CLIP; "cls" or "tokens" for models whose text embedding is the token sequence).
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        mlm: MaskedLanguageModel,
        steps: int = 10,
        step_size: float | None = None,
        representation: Representation = "embeds",
        top_k: int = 10,
        threshold: float = 0.3,
        quirks: Quirks | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        self.steps = steps
        self.step_size = 1.25 * threat.eps / steps if step_size is None else step_size
        self.quirks = quirks or Quirks()
        self.words = WordSubstitution(
            mlm=mlm,
            max_words=threat.max_words,
            choice="kl",
            importance=representation,
            compare=representation,
            top_k=top_k,
            threshold=threshold,
            quirks=self.quirks,
        )

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        texts = self.words.search(model, self.words.plan(model, batch.texts), None)
        value = KLFromClean().bind(model, batch, context)
        start = random_start(
            batch, self.threat, draws, one_sided=self.quirks.one_sided_start, clamp=self.quirks.clamp_start
        )
        images = ascend(
            lambda x, step: value(model.encode_image(x)),
            batch.images,
            start,
            threat=self.threat,
            steps=self.steps,
            step_size=self.step_size,
        )
        return images, texts
