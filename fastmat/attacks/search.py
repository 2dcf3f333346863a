"""Projected gradient ascent on images: the search that PGD, SGA, Sep-Attack and the defences share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmat import ops
from fastmat.attacks.draws import Draws
from fastmat.attacks.engine import active
from fastmat.attacks.graph import Repeated
from fastmat.errors import UserError
from fastmat.types import Batch, ThreatModel


def check_steps(steps: int, step_size: float | None) -> None:
    """Raise UserError unless there is a step to take and its size (None: the attack's own) is finite, not negative."""
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    if step_size is not None and not 0 <= step_size < math.inf:
        raise UserError(f"step_size must be a finite number that is not negative, got {step_size}")


def check_restarts(restarts: int, *, random_start: bool) -> None:
    """Raise UserError unless there is a run, and no two runs are the same."""
    if restarts < 1:
        raise UserError(f"restarts must be at least 1, got {restarts}")
    if restarts > 1 and not random_start:
        raise UserError(f"restarts must be 1 without random_start, which makes them differ, got {restarts}")


def random_start(
    batch: Batch, threat: ThreatModel, draws: Draws, *, restart: int = 0, one_sided: bool = False, clamp: bool = True
) -> Tensor:
    """A start inside the ball: uniform in the Linf ball, or a uniform direction and radius share in the L2 ball.

    restart: from 0; each has draws of its own. one_sided: Co-Attack's start, uniform in [0, eps]
    (`Quirks.one_sided_start`).
    """
    shape, again = batch.images.shape[1:], f"/{restart}" if restart else ""
    if threat.norm == "linf":
        draw, radius = draws.uniform(f"start{again}", batch.index, shape), None
        draw = draw.add(1).div(2) if one_sided else draw
    else:
        draw = draws.normal(f"start{again}", batch.index, shape)
        radius = draws.uniform(f"start_radius{again}", batch.index, ()).add(1).div(2)
    bounds = threat.bounds if clamp else (-math.inf, math.inf)
    return ops.random_start(batch.images, eps=threat.eps, norm=threat.norm, bounds=bounds, draw=draw, radius=radius)


@torch.enable_grad()
def ascend(
    value: Callable[[Tensor, Any], Tensor],
    x0: Tensor,
    start: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    decay: float | None = None,
    velocity: Tensor | None = None,
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """`steps` projected-gradient steps from `start`, maximising `value(x, noise(step)) -> [B]`.

    Gradients with respect to the pixels only; `x` stays fp32 and inside ball and box after every step. decay: of
    MI-FGSM's velocity; None: the gradient alone. velocity: to begin with, changed in place; None: at rest. noise: what
    is random in a step, a new tensor of one shape for every step, drawn outside of it, so that a captured step
    (`Engine.cuda_graph`) gets fresh noise too; or None.
    """
    if threat.eps == 0:
        return x0
    x = start.clone()  # steps are taken in place
    velocity = torch.zeros_like(x) if velocity is None else velocity
    ball: dict[str, Any] = {"eps": threat.eps, "norm": threat.norm, "bounds": threat.bounds}
    drawn = None if noise is None else noise(0)

    def step() -> None:
        live = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(value(live, drawn).sum(), live)
        if decay is None:
            ops.pgd_step(x, gradient, x0, step_size=step_size, out=x, **ball)
        else:
            ops.momentum_step(x, velocity, gradient, x0, step_size=step_size, decay=decay, out=x, **ball)

    take = Repeated(step) if active().cuda_graph else step
    for number in range(steps):
        if number and noise is not None and drawn is not None:
            drawn.copy_(noise(number))  # a captured step reads this very tensor
        take()
    return x


@torch.enable_grad()
def value_and_gradient(value: Callable[[Tensor], Tensor], x: Tensor, *, gradient: bool = True) -> tuple[Tensor, Tensor]:
    """[B] values, and their gradient with respect to the pixels; `x` in its place where no gradient is needed."""
    live = x.detach().requires_grad_(gradient)
    values = value(live)
    return values.detach(), torch.autograd.grad(values.sum(), live)[0] if gradient else x


def keep(chosen: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`new` where `chosen` [B], else `old`; tensors [B, ...]."""
    return tuple(torch.where(chosen.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(new, old, strict=True))
