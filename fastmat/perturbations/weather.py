"""Weather (ImageNet-C, Hendrycks and Dietterich, ICLR 2019, whose constants these are)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastmat.perturbations.blur import filtered, trail, zoomed
from fastmat.perturbations.noise import Pixels

# Mean and standard deviation of the flakes; zoom; threshold; radius and standard deviation of their fall; what stays of
# the image's own light.
SNOW = (
    (0.1, 0.3, 3.0, 0.5, 10, 4.0, 0.8),
    (0.2, 0.3, 2.0, 0.5, 12, 4.0, 0.7),
    (0.55, 0.3, 4.0, 0.9, 12, 8.0, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8.0, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12.0, 0.55),
)
# How much of the image and of a picture of frost.
FROST = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
# How thick; how fast details fade.
FOG = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
GREY = np.array([0.299, 0.587, 0.114])


def snow(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """A paler image, and flakes that fall from both sides."""
    mean, spread, zoom, threshold, radius, sigma, own = SNOW[level]
    flakes = zoomed(rng.normal(mean, spread, size=x.shape[:2]), zoom)
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = filtered(flakes, trail(radius, sigma, rng.uniform(-135, -45)), mode="nearest")[..., None]
    pale = np.maximum(x, (x @ GREY)[..., None] * 1.5 + 0.5)
    return own * x + (1 - own) * pale + flakes + flakes[::-1, ::-1]


def frost(x: Pixels, level: int, rng: np.random.Generator, *, pictures: Sequence[Pixels]) -> Pixels:
    """Seen through a part of one of `pictures`, enlarged where they are smaller than the image."""
    own, other = FROST[level]
    picture = pictures[int(rng.integers(len(pictures)))]
    height, width = x.shape[:2]
    times = -(-max(height / picture.shape[0], width / picture.shape[1]) // 1)
    picture = picture.repeat(int(times), 0).repeat(int(times), 1)
    top, left = (int(rng.integers(have - side + 1)) for have, side in zip(picture.shape, (height, width), strict=False))
    return own * x + other * picture[top : top + height, left : left + width]


def fog(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """A cloud over the image, and its contrast less."""
    thickness, fade = FOG[level]
    side = 1 << (max(x.shape[:2]) - 1).bit_length()
    cloud = plasma(side, fade, rng)[: x.shape[0], : x.shape[1], None]
    brightest = x.max()
    thick: Pixels = (x + thickness * cloud) * brightest / (brightest + thickness)
    return thick


def brightness(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """The value of HSV raised, hue and saturation kept."""
    value = x.max(2, keepdims=True)
    raised = (value + BRIGHTNESS[level]).clip(0, 1)
    return np.where(value > 0, x * (raised / np.where(value > 0, value, 1)), raised)


def plasma(side: int, fade: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A cloud [side, side] in [0, 1] that wraps around: midpoints displaced, in squares and in diamonds, by ever less.

    side: a power of two. fade: what the displacement is divided by from one scale to the next.
    """
    cloud = np.zeros((side, side))
    step, size = side, 100.0
    while step > 1:
        half = step // 2
        # Middles of squares, from their four corners.
        corners = cloud[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        middles = (pairs + np.roll(pairs, -1, 1)) / 4
        cloud[half::step, half::step] = middles + size * rng.uniform(-size, size, middles.shape)
        # Middles of edges, from two corners and two middles.
        corners, middles = cloud[::step, ::step], cloud[half::step, half::step]
        across = (corners + np.roll(corners, -1, 1) + middles + np.roll(middles, 1, 0)) / 4
        along = (corners + np.roll(corners, -1, 0) + middles + np.roll(middles, 1, 1)) / 4
        cloud[::step, half::step] = across + size * rng.uniform(-size, size, across.shape)
        cloud[half::step, ::step] = along + size * rng.uniform(-size, size, along.shape)
        step, size = half, size / fade
    cloud -= cloud.min()
    return cloud / max(cloud.max(), 1e-12)
