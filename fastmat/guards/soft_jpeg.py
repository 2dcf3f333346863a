"""A JPEG file without the file, with a derivative: what an attacker differentiates in place of the real one.

Colours, halved chroma, the cosine transform of 8 x 8 blocks and the division by the quality's tables are JPEG's own
(ITU T.81, with Annex K's tables and libjpeg's scaling). Only rounding is replaced, by round(c) + (c - round(c))^3 (Shin
and Song, NeurIPS workshop 2017): its derivative is large where a small push takes a coefficient to another integer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.guards.dct import dct, inverse_dct

SIDE = 8
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)
# Luma, and both chroma, of red, green and blue (JFIF).
COLOURS = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def soft_jpeg(images: Tensor, *, quality: int) -> Tensor:
    """[B, 3, H, W] in [0, 1] to about what a JPEG file of it shows; quality 1 to 100."""
    high, wide = images.shape[-2:]
    padded = F.pad(255 * images, (0, -wide % (2 * SIDE), 0, -high % (2 * SIDE)), mode="replicate")
    mix = torch.tensor(COLOURS).to(images)
    channels = torch.einsum("ij,bjhw->bihw", mix, padded)
    luma = compressed(channels[:, :1] - 128, table(LUMA, quality)) + 128
    chroma = compressed(F.avg_pool2d(channels[:, 1:], 2), table(CHROMA, quality))
    grown = F.interpolate(chroma, scale_factor=2, mode="bilinear")
    shown = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(mix), torch.cat([luma, grown], 1)) / 255
    return shown[..., :high, :wide]  # not clamped: a pixel at the edge of the box keeps its gradient


def compressed(x: Tensor, steps: Tensor) -> Tensor:
    """[B, C, H, W], H and W multiples of 8, with the coefficients of each block as multiples of steps [8, 8]."""
    blocks = x.unflatten(-2, (-1, SIDE)).unflatten(-1, (-1, SIDE)).transpose(-3, -2)
    coefficients = dct(blocks) / steps.to(x)
    whole = coefficients.round().detach()
    softly = whole + (coefficients - whole) ** 3
    return inverse_dct(softly * steps.to(x)).transpose(-3, -2).flatten(-4, -3).flatten(-2)


def table(base: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """libjpeg's steps [8, 8].

    >>> int(table(LUMA, 50)[0, 0]), int(table(LUMA, 75)[0, 0]), int(table(LUMA, 100)[7, 7])
    (16, 8, 1)
    """
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(base) * scale + 50) // 100).clamp(1, 255)
