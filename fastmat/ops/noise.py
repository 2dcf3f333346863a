"""Noise by counter: a pure function of (seed, sample, element), equal on every backend and for every batch split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from fastmat.errors import UserError
from fastmat.ops.arguments import check_dtype, check_shape
from fastmat.ops.backend import Backend, uses_triton

CHUNK = 1 << 14  # counters, of eight values each: few calls per value, and a working set that stays in the cache


def uniform_noise(seed: int, index: Tensor, shape: Sequence[int], *, backend: Backend | None = None) -> Tensor:
    """[B, *shape] fp32, uniform in (-1, 1); row b depends on `seed`, index[b] and the element count of `shape`.

    seed: any integer, taken modulo 2^64. index: [B] int64, the samples' positions in their set; the result is on its
        device, bit-identical on all.
    Philox-4x64-10 (Salmon et al., SC 2011; NumPy's `Philox`), 23 bits per value. Writes 4 bytes per element.
    Raises ValueError when `seed` is no whole number, `index` not one-dimensional int64, or a side of `shape` negative.
    """
    return _noise(seed, index, shape, False, backend)


def normal_noise(seed: int, index: Tensor, shape: Sequence[int], *, backend: Backend | None = None) -> Tensor:
    """As `uniform_noise`, standard normal by Box-Muller (within 5.8); backends agree to rounding of log and cos."""
    return _noise(seed, index, shape, True, backend)


def _noise(seed: int, index: Tensor, shape: Sequence[int], normal: bool, backend: Backend | None) -> Tensor:
    check_dtype("index", index, (torch.int64,))
    check_shape("index", index, (index.numel(),), "one position per image")
    if not isinstance(shape, (tuple, list)) or any(side < 0 for side in shape):
        raise UserError(f"shape must be the sides of one image, none of them negative, got {shape!r}")
    return noise_op(index, math.prod(shape), signed(seed), normal, backend or "").view(len(index), *shape)


def signed(seed: int) -> int:
    """The same 64 bits as a signed integer, which operator schemas hold."""
    if not isinstance(seed, Integral):
        raise UserError(f"seed must be a whole number, got {seed!r}")
    return (int(seed) + (1 << 63)) % (1 << 64) - (1 << 63)


@torch.library.custom_op("fastmat::noise", mutates_args=())
def noise_op(index: Tensor, n: int, seed: int, normal: bool, backend: str) -> Tensor:
    out = torch.empty(len(index), n, dtype=torch.float32, device=index.device)
    if uses_triton(backend, index.device):
        from fastmat.kernels.noise import launch_noise

        launch_noise(out, index.contiguous(), seed, normal=normal)
    else:
        noise_reference(out, index, seed, normal=normal)
    return out


@noise_op.register_fake
def _(index: Tensor, n: int, seed: int, normal: bool, backend: str) -> Tensor:
    return index.new_empty((index.shape[0], n), dtype=torch.float32)


def noise_reference(out: Tensor, index: Tensor, seed: int, *, normal: bool) -> None:
    """Fill out [B, n] fp32; kernels/noise.py states which element takes which bits."""
    n = out.shape[1]
    eighth = -(-n // 8)
    images = max(1, CHUNK // max(1, eighth))
    for b in range(0, len(out), images):
        streams = [philox(seed, i) for i in index[b : b + images].tolist()]
        for start in range(0, eighth, CHUNK):
            count = min(CHUNK, eighth - start)
            values = unit_interval(halves([stream.random_raw(4 * count) for stream in streams]))
            if normal:
                radius, angle = values[0::2].log().mul_(-2).sqrt_(), values[1::2] * (2 * math.pi)
                torch.mul(radius, angle.cos(), out=values[0::2])
                torch.mul(radius, angle.sin_(), out=values[1::2])
            else:
                values.mul_(2).sub_(1)
            for k, block in enumerate(values):
                place = out[b : b + images, k * eighth + start : min(k * eighth + start + count, n)]
                place.copy_(block[:, : place.shape[1]])


def philox(seed: int, index: int, *, stream: int = 0) -> np.random.Philox:
    """The stream of one image."""
    words = [value % (1 << 64) for value in (0, stream, index, 0)]
    return np.random.Philox(key=np.array([seed % (1 << 64), 0], np.uint64), counter=np.array(words, np.uint64))


def halves(raw: Sequence[np.ndarray]) -> Tensor:
    """b streams of 4 c uint64 words to int32 [8, b, c]."""
    return torch.from_numpy(np.stack(raw).view(np.int32)).view(len(raw), -1, 8).permute(2, 0, 1).contiguous()


def unit_interval(bits: Tensor) -> Tensor:
    """int32 bits to fp32 in (0, 1), exactly."""
    return (bits >> 9).bitwise_and_(0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
