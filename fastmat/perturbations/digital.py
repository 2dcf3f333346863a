"""What cameras and files do (ImageNet-C, Hendrycks and Dietterich, ICLR 2019, whose constants these are)."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy import ndimage

from fastmat.perturbations.noise import Pixels

CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)
JPEG = (25, 18, 15, 10, 7)
# Displacement, its smoothness, and that of the corners, in sides of the image. (Published: of 244 pixels, always.)
ELASTIC = ((2.0, 0.7, 0.1), (2.0, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))


def contrast(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """Every channel nearer to its mean."""
    mean = x.mean((0, 1), keepdims=True)
    return mean + CONTRAST[level] * (x - mean)


def elastic_transform(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """A random affine map, then small displacements of every pixel."""
    height, width = x.shape[:2]
    side = min(height, width)
    strength, smooth, corner = (side * part for part in ELASTIC[level])
    middle, third = np.array([height, width]) // 2, side // 3
    anchors = np.array([middle + third, middle + np.array([third, -third]), middle - third], dtype=np.float64)
    moved = anchors + rng.uniform(-corner, corner, size=anchors.shape)
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).astype(np.float64)
    # Where each pixel comes from: the affine map that takes the moved anchors back.
    affine, *_ = np.linalg.lstsq(np.c_[moved, np.ones(3)], anchors, rcond=None)
    turned = sampled(x, np.c_[grid.reshape(-1, 2), np.ones(height * width)] @ affine, mode="mirror")
    shift = [
        strength * ndimage.gaussian_filter(rng.uniform(-1, 1, (height, width)), smooth, mode="reflect", truncate=3)
        for _ in range(2)
    ]
    return sampled(turned, (grid + np.stack(shift, -1)).reshape(-1, 2), mode="reflect")


def pixelate(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """Made smaller, and large again in blocks."""
    image = to_image(x)
    width, height = image.size
    small = image.resize(
        (max(1, int(width * PIXELATE[level])), max(1, int(height * PIXELATE[level]))), Image.Resampling.BOX
    )
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST)) / 255


def jpeg_compression(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """Saved with a low quality, and read."""
    file = io.BytesIO()
    to_image(x).save(file, "JPEG", quality=JPEG[level])
    return np.asarray(Image.open(file).convert("RGB")) / 255


def to_image(x: Pixels) -> Image.Image:
    return Image.fromarray((x * 255).round().astype(np.uint8))


def sampled(x: Pixels, places: np.ndarray, *, mode: str) -> Pixels:
    """x at places [H * W, 2], bilinear."""
    channels = [ndimage.map_coordinates(x[..., c], places.T, order=1, mode=mode) for c in range(3)]
    return np.stack(channels, -1).reshape(x.shape)
