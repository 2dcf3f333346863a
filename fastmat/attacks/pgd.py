"""PGD (Madry et al., ICLR 2018), with any objective of `fastmat.attacks.objectives`."""

from __future__ import annotations

from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.objectives import Contrastive, Objective
from fastmat.attacks.search import ascend, check_steps, random_start
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.types import AttackContext, Batch, ThreatModel


class PGD(Attack):
    """Image only. Defaults: 10 steps of eps/4, random start (the step that SGA and Madry's CIFAR recipe use).

    steps: iterations, at least 1. step_size: in pixel units; None: eps / 4 (Linf) or eps / 5 (L2).
    objective: what is ascended. random_start: uniform in the ball.
    Raises UserError without a step or with a negative step size.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        objective: Objective | None = None,
        steps: int = 10,
        step_size: float | None = None,
        random_start: bool = True,
        quirks: Quirks | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        check_steps(steps, step_size)
        self.objective = objective or Contrastive()
        self.steps = steps
        self.step_size = threat.eps / (4 if threat.norm == "linf" else 5) if step_size is None else step_size
        self.random_start = random_start
        self.quirks = quirks or Quirks()

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        value = self.objective.bind(model, batch, context)
        start = batch.images
        if self.random_start:
            quirks = self.quirks
            start = random_start(batch, self.threat, draws, one_sided=quirks.one_sided_start, clamp=quirks.clamp_start)
        images = ascend(
            lambda x, step: value(model.encode_image(x)),
            batch.images,
            start,
            threat=self.threat,
            steps=self.steps,
            step_size=self.step_size,
        )
        return images, batch.texts
