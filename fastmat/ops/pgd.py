"""The projected-gradient update: direction, step, projection to the ball, clamp to the pixel box."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmat.types import Norm


def pgd_step(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    eps: float,
    step_size: float,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """One ascent step from `x` [B, ...] fp32 along `grad` (any float dtype), inside ball and box around `x0`.

    Direction: sign of the gradient (Linf), or the gradient over its per-image 2-norm (L2). A NaN component moves
    nothing in Linf; a gradient with a non-finite norm moves nothing in L2.
    """
    grad = grad.float()
    if norm == "linf":
        direction = grad.nan_to_num(nan=0.0).sign_()
    else:
        length = grad.flatten(1).norm(dim=1).view(-1, *[1] * (grad.dim() - 1))
        direction = torch.where(length.isfinite(), grad, 0.0) / (length.nan_to_num(posinf=0.0) + 1e-10)
    return project(torch.add(x, direction, alpha=step_size), x0, eps=eps, norm=norm, bounds=bounds)


def project(
    x: Tensor, x0: Tensor, *, eps: float, norm: Norm = "linf", bounds: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """The point of the eps ball around `x0` nearest to `x`, then clamped to the box. All [B, ...] fp32."""
    delta = x - x0
    if norm == "linf":
        delta.clamp_(-eps, eps)
    else:
        length = delta.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
        delta.mul_((eps / length.clamp_min(1e-30)).clamp_max(1.0))
    return delta.add_(x0).clamp_(*bounds)
