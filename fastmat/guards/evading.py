"""PGD that must not be seen: it ascends its objective where a detector is silent, and silences it elsewhere."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.objectives import Contrastive, Objective
from fastmat.attacks.search import ascend, check_steps, random_start
from fastmat.guards.detector import Detector
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.types import AttackContext, Batch, ThreatModel


class EvadingPGD(Attack):
    """Image only; the adaptive attack on a defence that acts on what `detector` flags. Selective gradients (Bryniarski
    et al., ICLR 2022, section 3): each image of each step moves for one of the two aims, so no weight between them is
    to be chosen.

    margin: how far below 0 a score must be to count as unseen; this project's choice. steps, step_size, objective: as
    of `PGD`; 20 steps, twice PGD's, since they serve two aims. The last quarter of them has step_size / 4.
    """

    official: ClassVar[Quirks] = Quirks()

    def __init__(
        self,
        *,
        threat: ThreatModel,
        detector: Detector,
        objective: Objective | None = None,
        steps: int = 20,
        step_size: float | None = None,
        margin: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        check_steps(steps, step_size)
        self.detector = detector
        self.objective = objective or Contrastive()
        self.steps = steps
        self.step_size = threat.eps / 4 if step_size is None else step_size
        self.margin = margin

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        value = self.objective.bind(model, batch, context)

        def selected(x: Tensor, _: object) -> Tensor:
            score = self.detector(x)
            return torch.where(score > -self.margin, -score, value(model.encode_image(x)))

        fine = self.steps // 4
        x = random_start(batch, self.threat, draws)
        for steps, size in ((self.steps - fine, self.step_size), (fine, self.step_size / 4)):
            x = ascend(selected, batch.images, x, threat=self.threat, steps=steps, step_size=size)
        return x, batch.texts
