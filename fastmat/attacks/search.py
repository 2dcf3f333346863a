"""Projected gradient ascent on images: the search that PGD, SGA, Sep-Attack and the defences share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmat import ops
from fastmat.attacks.draws import Draws
from fastmat.errors import UserError
from fastmat.types import Batch, ThreatModel


def check_steps(steps: int, step_size: float | None) -> None:
    """Raise UserError unless there is a step to take and its size (None: the attack's own) is finite, not negative."""
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    if step_size is not None and not 0 <= step_size < math.inf:
        raise UserError(f"step_size must be a finite number that is not negative, got {step_size}")


def random_start(
    batch: Batch, threat: ThreatModel, draws: Draws, *, one_sided: bool = False, clamp: bool = True
) -> Tensor:
    """A start inside the ball: uniform in the Linf ball, or a uniform direction and radius share in the L2 ball.

    one_sided: Co-Attack's start, uniform in [0, eps] (`Quirks.one_sided_start`).
    """
    shape = batch.images.shape[1:]
    if threat.norm == "linf":
        draw, radius = draws.uniform("start", batch.index, shape), None
        draw = draw.add(1).div(2) if one_sided else draw
    else:
        draw = draws.normal("start", batch.index, shape)
        radius = draws.uniform("start_radius", batch.index, ()).add(1).div(2)
    bounds = threat.bounds if clamp else (-math.inf, math.inf)
    return ops.random_start(batch.images, eps=threat.eps, norm=threat.norm, bounds=bounds, draw=draw, radius=radius)


@torch.enable_grad()
def ascend(
    value: Callable[[Tensor, int], Tensor],
    x0: Tensor,
    start: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    decay: float | None = None,
) -> Tensor:
    """`steps` projected-gradient steps from `start`, maximising `value(x, step) -> [B]`.

    Gradients with respect to the pixels only; `x` stays fp32 and inside ball and box after every step. decay: of
    MI-FGSM's velocity; None: the gradient alone.
    """
    if threat.eps == 0:
        return x0
    x = start.clone()  # steps are taken in place
    velocity = None if decay is None else torch.zeros_like(x)
    ball: dict[str, Any] = {"eps": threat.eps, "norm": threat.norm, "bounds": threat.bounds}
    for step in range(steps):
        live = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(value(live, step).sum(), live)
        if velocity is None or decay is None:
            ops.pgd_step(x, gradient, x0, step_size=step_size, out=x, **ball)
        else:
            ops.momentum_step(x, velocity, gradient, x0, step_size=step_size, decay=decay, out=x, **ball)
    return x
