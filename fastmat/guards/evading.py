"""PGD that must not be seen: it ascends its objective where a detector is silent, and silences it elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.objectives import Contrastive, Objective
from fastmat.attacks.search import check_steps, keep
from fastmat.guards.detector import Detector
from fastmat.models.protocol import VisionLanguageModel
from fastmat.ops import project
from fastmat.types import AttackContext, Batch, ThreatModel


class EvadingPGD(Attack):
    """Image only; the adaptive attack on a defence that acts on what `detector` flags. Selective gradients (Bryniarski
    et al., ICLR 2022, section 3): each image of each step moves for one of the two aims, so that no weight between them
    is to be chosen. Each image keeps its best iterate among those that pass, its last where none does.

    objective: must have a gradient at the clean image, where it starts: a random start would be seen.
    margin: how far below 0 a score must be to pass; steps 100 and step_size eps / 4, which falls linearly to 0; towards
        the objective signs are followed, away from the detector the gradient itself, scaled to its largest pixel: noise
        is what detectors see. All this project's choice.
    Raises UserError without a step or with a negative step size.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        detector: Detector,
        objective: Objective | None = None,
        steps: int = 100,
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

    @torch.enable_grad()
    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        value = self.objective.bind(model, batch, context)
        x, threat = batch.images, self.threat
        best: tuple[Tensor, ...] = (x, torch.full((len(x),), -torch.inf, device=x.device))
        for step in range(self.steps + 1):
            live = x.detach().requires_grad_(True)
            score, reached = self.detector(live), value(model.encode_image(live))
            seen = score.detach() > -self.margin
            best = keep(~seen & (reached.detach() > best[1]), (x, reached.detach()), best)
            if step == self.steps:
                break
            (away,) = torch.autograd.grad(score.sum(), live)
            (up,) = torch.autograd.grad(reached.sum(), live)
            away = away / away.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
            direction = torch.where(seen.view(-1, 1, 1, 1), -away, up.sign())
            size = self.step_size * (1 - step / self.steps)
            x = project(x + size * direction, batch.images, eps=threat.eps, norm=threat.norm, bounds=threat.bounds)
        passed = best[1] > -torch.inf
        return torch.where(passed.view(-1, 1, 1, 1), best[0], x), batch.texts
