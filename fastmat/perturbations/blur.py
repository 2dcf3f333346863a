"""Blur (ImageNet-C, Hendrycks and Dietterich, ICLR 2019, whose constants these are; lengths in pixels)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fastmat.perturbations.noise import Pixels

# Radius; standard deviation that softens the disk's edge.
DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
# Standard deviation; how far a pixel may go; how often.
GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
# Radius; standard deviation.
MOTION = ((10, 3.0), (15, 5.0), (15, 8.0), (15, 12.0), (20, 15.0))
# Last zoom; step.
ZOOM = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.33, 0.03))


def defocus_blur(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """Every point a disk."""
    radius, softness = DEFOCUS[level]
    line = np.arange(-radius - 2, radius + 3)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(np.float64)
    disk = ndimage.gaussian_filter(disk, softness, radius=1 if radius <= 8 else 2)
    return filtered(x, disk / disk.sum(), mode="mirror")


def glass_blur(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """Neighbours change places, between two softenings. (Published code copies one over the other, by a slip.)"""
    sigma, reach, times = GLASS[level]
    soft = softened(x, sigma)
    height, width = x.shape[:2]
    order = list(range(height * width))
    for _ in range(times):
        steps = rng.integers(-reach, reach, size=(height, width, 2)).tolist()
        for row in range(height - reach, reach, -1):
            for column in range(width - reach, reach, -1):
                down, right = steps[row - 1][column - 1]
                here, there = row * width + column, (row + down) * width + column + right
                order[here], order[there] = order[there], order[here]
    return softened(soft.reshape(-1, 3)[order].reshape(x.shape), sigma)


def motion_blur(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """Along a line at most 45 degrees from the horizontal."""
    radius, sigma = MOTION[level]
    return filtered(x, trail(radius, sigma, rng.uniform(-45, 45)), mode="nearest")


def zoom_blur(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """The mean of the image and ever nearer ones."""
    stop, step = ZOOM[level]
    factors = np.arange(1, stop, step)
    total = x + sum(zoomed(x, factor) for factor in factors)
    mean: Pixels = total / (len(factors) + 1)
    return mean


def softened(x: Pixels, sigma: float) -> Pixels:
    soft: Pixels = ndimage.gaussian_filter(x, (sigma, sigma, 0)[: x.ndim], mode="nearest")
    return soft


def trail(radius: int, sigma: float, angle: float) -> NDArray[np.float64]:
    """A kernel [K, K]: half a Gaussian from the centre on, in a direction in degrees."""
    reach = 2 * radius
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    down, right = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    for i in range(reach + 1):
        kernel[reach + round(i * down), reach + round(i * right)] += math.exp(-(i**2) / (2 * sigma**2))
    return kernel / kernel.sum()


def filtered(x: NDArray[np.float64], kernel: NDArray[np.float64], *, mode: str) -> NDArray[np.float64]:
    """Every channel of [H, W, 3], or [H, W], by itself."""
    out: NDArray[np.float64] = ndimage.correlate(x, kernel[..., None] if x.ndim == 3 else kernel, mode=mode)
    return out


def zoomed(x: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    """The middle of [H, W, ...], enlarged to the same size by bilinear interpolation."""
    size = x.shape[:2]
    part = [math.ceil(side / factor) for side in size]
    first = [(side - inner) // 2 for side, inner in zip(size, part, strict=True)]
    middle = x[first[0] : first[0] + part[0], first[1] : first[1] + part[1]]
    scale = [max(factor, side / inner) for side, inner in zip(size, part, strict=True)]
    large = ndimage.zoom(middle, [*scale, *[1] * (x.ndim - 2)], order=1)
    trim = [(have - side) // 2 for have, side in zip(large.shape, size, strict=False)]
    out: NDArray[np.float64] = large[trim[0] : trim[0] + size[0], trim[1] : trim[1] + size[1]]
    return out
