"""The projected-gradient update in plain PyTorch, on [B, n] tensors: the CPU path, and the oracle of the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 17  # elements per step of the reference: its temporaries stay in the cache of one core


def pgd_update_reference(
    out: Tensor,
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    eps: float | Tensor,
    step_size: float | Tensor,
    norm: str,
    low: float,
    high: float,
    velocity: Tensor | None = None,
    decay: float = 0.0,
    rule: str = "",
    previous: Tensor | None = None,
    inertia: float = 1.0,
) -> None:
    """The same on [B, n] tensors, written into `out`, `velocity` and `previous`; `out` may be `x`.

    Works through the images in blocks that fit a cache, so that memory is crossed as often as the kernel crosses it.
    """
    moved, other = x.new_empty(0), x.new_empty(0)  # used again for every block: fresh memory costs page faults
    for rows, columns in blocks(x, whole_images=norm == "l2" or rule == "mi"):
        part = rows, columns
        start = x[part]
        moved.resize_(start.shape)
        center = x0[part].float().div_(255) if x0.dtype == torch.uint8 else x0[part]
        radius = eps[rows, None].clamp_min(0) if isinstance(eps, Tensor) else eps
        size = step_size[rows, None].clamp_min(0) if isinstance(step_size, Tensor) else step_size
        source = grad[part].float()
        if velocity is not None:
            source = accumulate(velocity[part], source, norm, decay, rule, moved)
        unit(source, norm, moved)
        if isinstance(size, Tensor):
            moved.mul_(size).add_(start)
        else:
            torch.add(start, moved, alpha=size, out=moved)
        if previous is None:
            project_(moved, center, radius, norm, low, high, out[part])
        else:
            project_(moved, center, radius, norm, low, high, moved)
            before = previous[part]
            torch.sub(start, before, out=other.resize_(start.shape))
            moved.sub_(start).mul_(inertia).add_(start).add_(other, alpha=1 - inertia)
            before.copy_(start)
            project_(moved, center, radius, norm, low, high, out[part])


def accumulate(velocity: Tensor, grad: Tensor, norm: str, decay: float, rule: str, scratch: Tensor) -> Tensor:
    """The updated velocity [b, n], in place."""
    velocity.mul_(decay)
    if rule == "mi":
        return velocity.add_(divided(grad, grad.abs().mean(1, keepdim=True, dtype=torch.float64), scratch))
    return unit(velocity.add_(unit(grad, norm, scratch)), norm, velocity)


def unit(source: Tensor, norm: str, out: Tensor) -> Tensor:
    """The direction of every row of [b, n], written into `out`; torch.sign(nan) is 0."""
    if norm == "linf":
        return torch.sign(source, out=out)
    return divided(source, torch.linalg.vector_norm(source, dim=1, keepdim=True, dtype=torch.float64), out)


def divided(rows: Tensor, length: Tensor, out: Tensor) -> Tensor:
    """rows / length [b, 1] into `out`, or zero where the length is of no use."""
    usable = (length > 1e-30) & (length < 3e38)
    return torch.mul(rows, (1 / length).float(), out=out).masked_fill_(~usable, 0.0)


def project_(
    x: Tensor, center: Tensor, radius: float | Tensor, norm: str, low: float, high: float, out: Tensor
) -> None:
    """Into the ball, in place, and then the box, into `out`, which may be x; x [b, n], radius a number or [b, 1]."""
    x.sub_(center)
    if norm == "l2":
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
        x.mul_(torch.where(length > radius, radius / length, 1.0).float())
    elif isinstance(radius, Tensor):
        torch.clamp(x, -radius, radius, out=x)
    else:
        x.clamp_(-radius, radius)
    torch.clamp(x.add_(center), low, high, out=out)


def blocks(x: Tensor, *, whole_images: bool) -> Iterator[tuple[slice, slice]]:
    """Row and column slices of [B, n] with about CHUNK elements each."""
    n = x.shape[1]
    images = max(1, CHUNK // max(1, n))
    width = n if whole_images else -(-n // -(-n // CHUNK)) if n else 0  # equal parts, none of them a splinter
    for b in range(0, len(x) if n else 0, images):
        for c in range(0, n, width):
            yield slice(b, b + images), slice(c, c + width)
