"""The random start of an attack: a point of the eps ball around x0, inside the pixel box."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmat.errors import UserError
from fastmat.ops.arguments import (
    check_bounds,
    check_device,
    check_dtype,
    check_ids,
    check_radius,
    check_shape,
    check_values,
    per_image,
)
from fastmat.ops.backend import Backend, uses_triton
from fastmat.ops.noise import halves, noise_reference, philox, signed, unit_interval
from fastmat.ops.pgd_reference import divided
from fastmat.types import Norm


@torch.no_grad()
def random_start(
    x0: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int | None = None,
    index: Tensor | None = None,
    draw: Tensor | None = None,
    radius: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """[B, ...] fp32: clamp(x0 + eps u) with u uniform (Linf), clamp(x0 + radius eps z / ||z||) with z normal (L2).

    x0: [B, ...] fp32, or uint8 (then divided by 255). eps: at least 0, a number or [B] fp32.
    Either `seed`: the draws are those of `uniform_noise` and `normal_noise` for (seed, index), radius is uniform in
        (0, 1); index [B] int64, default 0 .. B - 1. Equal on every backend (L2: to rounding), whatever the batch.
    Or `draw` [B, ...] fp32, and for L2 `radius` [B] fp32: recorded or other draws.
    bounds of (-inf, inf) do not clamp, as some published starts. Bytes on a GPU: 8 per element (Linf, seeded).
    Raises ValueError naming the argument for both or neither of seed and draw, and for wrong shapes, dtypes, devices.
    """
    if (seed is None) == (draw is None):
        raise UserError("random_start takes either seed or draw")
    if norm not in ("linf", "l2"):
        raise UserError(f"norm must be 'linf' or 'l2', got {norm!r}")
    if (radius is not None) != (draw is not None and norm == "l2"):
        raise UserError("radius belongs to draw and norm 'l2', and these need it")
    check_dtype("x0", x0, (torch.float32, torch.uint8))
    check_bounds(bounds)
    if x0.dim() == 0:
        raise UserError("x0 must have a first dimension of images, got a number")
    eps_each, eps_number = per_image("eps", eps, x0, positive=False)
    check_radius(eps_number, norm, bounds)
    if index is None:
        index = torch.arange(len(x0), device=x0.device)
    check_ids("index", index, len(x0), "one per image")
    if draw is not None:
        check_dtype("draw", draw, (torch.float32,))
        check_shape("draw", draw, x0.shape, "of x0")
    if radius is not None:
        check_dtype("radius", radius, (torch.float32,))
        check_shape("radius", radius, x0.shape[:1], "one per image")
    check_device(x0.device, index=index, draw=draw, radius=radius)
    low, high = map(float, bounds)
    return start_op(x0, index, draw, radius, eps_each, eps_number, norm, low, high, signed(seed or 0), backend or "")


@torch.library.custom_op("fastmat::random_start", mutates_args=())
def start_op(
    x0: Tensor,
    index: Tensor,
    draw: Tensor | None,
    radius: Tensor | None,
    eps_each: Tensor | None,
    eps: float,
    norm: str,
    low: float,
    high: float,
    seed: int,
    backend: str,
) -> Tensor:
    check_values("eps", eps_each, positive=False)
    out = torch.empty(x0.shape, dtype=torch.float32, device=x0.device)
    flat = out.view(len(x0), -1) if out.numel() else out.view(len(x0), 0)
    clean = x0.contiguous().view(flat.shape)
    settings: dict[str, Any] = {
        "eps": eps if eps_each is None else eps_each.contiguous(),
        "norm": norm,
        "low": low,
        "high": high,
        "seed": seed,
        "index": index.contiguous(),
        "draw": None if draw is None else draw.contiguous().view(flat.shape),
        "radius": None if radius is None else radius.contiguous(),
    }
    if uses_triton(backend, x0.device):
        from fastmat.kernels.start import launch_start

        launch_start(flat, clean, **settings)
    else:
        start_reference(flat, clean, **settings)
    return out


@start_op.register_fake
def _(x0: Tensor, *_: object) -> Tensor:
    return torch.empty(x0.shape, dtype=torch.float32, device=x0.device)


def start_reference(
    out: Tensor,
    x0: Tensor,
    *,
    eps: float | Tensor,
    norm: str,
    low: float,
    high: float,
    seed: int,
    index: Tensor,
    draw: Tensor | None,
    radius: Tensor | None,
) -> None:
    """The same on [B, n] tensors, written into `out`."""
    if draw is None:
        noise_reference(out, index, seed, normal=norm == "l2")
    else:
        out.copy_(draw)
    size = eps[:, None].clamp_min(0) if isinstance(eps, Tensor) else eps
    if norm == "l2":
        if radius is None:
            radius = out.new_tensor([float(first_unit(seed, i)) for i in index.tolist()])
        size = size * radius[:, None]
        divided(out, torch.linalg.vector_norm(out, dim=1, keepdim=True, dtype=torch.float64), out)
    out.mul_(size).add_(x0.float().div_(255) if x0.dtype == torch.uint8 else x0).clamp_(low, high)


def first_unit(seed: int, index: int) -> Tensor:
    """The radius of one image, in (0, 1): the first half of its stream 1."""
    return unit_interval(halves([philox(seed, index, stream=1).random_raw(4)]))[0, 0, 0]
