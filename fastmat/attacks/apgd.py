"""APGD: projected gradient ascent whose step sizes adapt to each image (Croce & Hein, ICML 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmat import ops
from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.engine import active
from fastmat.attacks.graph import Repeated
from fastmat.attacks.objectives import Contrastive, Objective
from fastmat.attacks.search import check_restarts, check_steps, keep, value_and_gradient
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.types import AttackContext, Batch, ThreatModel


class APGD(Attack):
    """Image only; the image of the highest objective over all steps and restarts. AutoAttack's constants.

    steps: iterations per restart, at least 1. step_size: of the first steps, in pixel units; None: 2 eps. It is halved
        at checkpoints, image by image, after which that image goes on from its best iterate.
    restarts: random starts, at least 1; each image keeps its best. objective: what is ascended.
    random_start: False starts at the clean image, as RobustVLM's copy does; more restarts would then be the same run.
    Costs steps + 1 forwards and steps backwards per restart. Nothing waits for the device.
    Raises UserError for steps or restarts below 1, a negative step size, or restarts without a random start.
    """

    official = Quirks(zero_history=True)

    def __init__(
        self,
        *,
        threat: ThreatModel,
        objective: Objective | None = None,
        steps: int = 100,
        step_size: float | None = None,
        restarts: int = 1,
        random_start: bool = True,
        quirks: Quirks | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        check_steps(steps, step_size)
        check_restarts(restarts, random_start=random_start)
        self.objective = objective or Contrastive()
        self.steps = steps
        self.step_size = step_size
        self.restarts = restarts
        self.random_start = random_start
        self.quirks = quirks or Quirks()

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        if self.threat.eps == 0:
            return batch.images, batch.texts
        value = self.objective.bind(model, batch, context)
        best = highest = None
        for restart in range(self.restarts):
            start = farthest_start(batch, self.threat, draws, restart) if self.random_start else batch.images
            images, values = ascend_adaptively(
                lambda x: value(model.encode_image(x)),
                batch.images,
                start,
                threat=self.threat,
                steps=self.steps,
                step_size=self.step_size,
                zero_history=self.quirks.zero_history,
            )
            if best is None or highest is None:
                best, highest = images, values
            else:
                best, highest = keep(values > highest, (images, values), (best, highest))
        assert best is not None
        return best, batch.texts


def farthest_start(batch: Batch, threat: ThreatModel, draws: Draws, restart: int) -> Tensor:
    """A random direction, stretched until it touches the ball, then clamped to the box."""
    shape, name = batch.images.shape[1:], f"start/{restart}"
    radius = None
    if threat.norm == "linf":
        draw = draws.uniform(name, batch.index, shape)
        draw = draw / draw.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
    else:
        draw = draws.normal(name, batch.index, shape)
        radius = torch.ones(len(draw), device=draw.device)
    return ops.random_start(
        batch.images, eps=threat.eps, norm=threat.norm, bounds=threat.bounds, draw=draw, radius=radius
    )


def ascend_adaptively(
    value: Callable[[Tensor], Tensor],
    x0: Tensor,
    start: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float | None = None,
    rho: float = 0.75,
    zero_history: bool = False,
) -> tuple[Tensor, Tensor]:
    """The iterate [B, 3, H, W] with the highest `value(x) -> [B]`, and that value [B], after `steps` steps of APGD.

    Checkpoints stand after 22 % of the steps, then ever closer by 3 %, not below 6 %. At one of them an image is stuck
    when its value rose in at most `rho` of the steps since the last, or when its best did not improve since then
    although its step size was left alone: its step size is halved and it goes back to its best iterate.
    """
    window, shrink, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    x, previous = start.clone(), start.clone()
    first = 2 * threat.eps if step_size is None else step_size
    size = torch.full((len(x),), first, dtype=torch.float32, device=x.device)

    def evaluate() -> tuple[Tensor, Tensor]:
        return value_and_gradient(value, x)

    if active().cuda_graph:
        evaluate = Repeated(evaluate)  # x, and what it returns, stay where they are: copied where they are kept
    now, grad = (tensor.clone() for tensor in evaluate())
    history = [torch.zeros_like(now) if zero_history else now]
    best: tuple[Tensor, ...] = (x.clone(), now, grad)
    at_check, left_alone = now, torch.zeros_like(now, dtype=torch.bool)
    since = 0
    for step in range(steps):
        ops.apgd_step(
            x,
            previous,
            grad,
            x0,
            eps=threat.eps,
            step_size=size,
            inertia=0.75 if step else 1.0,
            norm=threat.norm,
            bounds=threat.bounds,
            out=x,
        )
        values, grad = evaluate() if step + 1 < steps else value_and_gradient(value, x, gradient=False)
        now = values.clone()
        history.append(now)
        best = keep(now > best[1], (x, now, grad), best)
        since += 1
        if since == window:
            recent = torch.stack(history[-window - 1 :])
            rises = (recent[1:] > recent[:-1]).sum(0)
            stuck = (rises <= rho * window) | (left_alone & (at_check >= best[1]))
            size = torch.where(stuck, size / 2, size)
            restored, grad = keep(stuck, (best[0], best[2]), (x, grad))
            x.copy_(restored)
            at_check, left_alone = best[1], ~stuck
            window, since = max(window - shrink, least), 0
    return best[0], best[1]
