"""Noise (ImageNet-C, Hendrycks and Dietterich, ICLR 2019, whose constants these are)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float64]  # [H, W, 3] in [0, 1]

GAUSSIAN = (0.08, 0.12, 0.18, 0.26, 0.38)
SHOT = (60, 25, 12, 5, 3)
IMPULSE = (0.03, 0.06, 0.09, 0.17, 0.27)
SPECKLE = (0.15, 0.2, 0.35, 0.45, 0.6)


def gaussian_noise(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """As of little light."""
    return x + rng.normal(scale=GAUSSIAN[level], size=x.shape)


def shot_noise(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """Photons counted, `SHOT` of them in a white value on the average."""
    counts: Pixels = rng.poisson(x * SHOT[level]) / SHOT[level]
    return counts


def impulse_noise(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """A share of the values black or white, each as often."""
    struck, white = rng.random(x.shape) < IMPULSE[level], rng.random(x.shape) < 0.5
    return np.where(struck, white.astype(np.float64), x)


def speckle_noise(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """In proportion to the value."""
    return x + x * rng.normal(scale=SPECKLE[level], size=x.shape)
