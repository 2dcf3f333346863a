"""PGD (Madry et al., ICLR 2018), with any objective of `fastmat.attacks.objectives`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.objectives import Contrastive, Objective
from fastmat.attacks.search import ascend, check_restarts, check_steps, keep, random_start
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.types import AttackContext, Batch, ThreatModel


class PGD(Attack):
    """Image only. Defaults: 10 steps of eps/4, random start (the step that SGA and Madry's CIFAR recipe use).

    steps: iterations, at least 1. step_size: in pixel units; None: eps / 4 (Linf) or eps / 5 (L2).
    objective: what is ascended. random_start: uniform in the ball.
    restarts: random starts, at least 1; each image keeps the one whose last iterate has the highest objective. Each
        restart costs a forward more than its steps. The first is the only one of `restarts=1`.
    Raises UserError without a step, with a negative step size, or for restarts that are below 1 or all the same.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        objective: Objective | None = None,
        steps: int = 10,
        step_size: float | None = None,
        random_start: bool = True,
        restarts: int = 1,
        quirks: Quirks | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        check_steps(steps, step_size)
        check_restarts(restarts, random_start=random_start)
        self.objective = objective or Contrastive()
        self.steps = steps
        self.step_size = threat.eps / (4 if threat.norm == "linf" else 5) if step_size is None else step_size
        self.random_start = random_start
        self.restarts = restarts
        self.quirks = quirks or Quirks()

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        value = self.objective.bind(model, batch, context)
        best: tuple[Tensor, ...] = ()
        for restart in range(self.restarts):
            images = ascend(
                lambda x, _: value(model.encode_image(x)),
                batch.images,
                self._start(batch, draws, restart),
                threat=self.threat,
                steps=self.steps,
                step_size=self.step_size,
            )
            if self.restarts == 1:
                return images, batch.texts
            with torch.no_grad():
                reached = (images, value(model.encode_image(images)))
            best = keep(reached[1] > best[1], reached, best) if best else reached
        return best[0], batch.texts

    def _start(self, batch: Batch, draws: Draws, restart: int) -> Tensor:
        if not self.random_start:
            return batch.images
        quirks = self.quirks
        return random_start(
            batch, self.threat, draws, restart=restart, one_sided=quirks.one_sided_start, clamp=quirks.clamp_start
        )
