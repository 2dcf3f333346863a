"""The discrete cosine transform of images, orthonormal: its inverse is its transpose."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def dct(x: Tensor) -> Tensor:
    """DCT-II over the last two dimensions, [..., H, W].

    >>> dct(torch.ones(2, 2)).round(decimals=4).abs().tolist()
    [[2.0, 0.0], [0.0, 0.0]]
    """
    return basis(x.shape[-2]).to(x) @ x @ basis(x.shape[-1]).to(x).T


def inverse_dct(x: Tensor) -> Tensor:
    """What `dct` makes x of, [..., H, W]."""
    return basis(x.shape[-2]).to(x).T @ x @ basis(x.shape[-1]).to(x)


def blocks(x: Tensor, side: int) -> Tensor:
    """[B, C, H, W] to [B, C, N, side, side], rest at the right and the lower edge left out."""
    high, wide = (length // side for length in x.shape[-2:])
    cut = x[..., : high * side, : wide * side].unflatten(-2, (high, side)).unflatten(-1, (wide, side))
    return cut.transpose(-3, -2).flatten(2, 3)


@lru_cache(maxsize=8)
def basis(n: int) -> Tensor:
    """[n, n] fp32: row k holds the k-th cosine."""
    place = torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi / n * (place + 0.5) * place[:, None]) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows.float()
