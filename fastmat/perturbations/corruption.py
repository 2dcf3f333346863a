"""Corruptions of images (ImageNet-C, Hendrycks and Dietterich, ICLR 2019), as an attack value like any other.

Written out from the published constants: `imagecorruptions` 1.1.2, of 2020, is not importable beside setuptools 84,
which has no pkg_resources; with an older one its fog and glass blur fail on NumPy 2.4 and scikit-image 0.26, and its
impulse noise cannot be seeded. Its pictures of frost are used where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastmat.errors import UserError
from fastmat.perturbations import blur, digital, noise, weather
from fastmat.perturbations.base import Perturbation, chosen, eight_bit
from fastmat.perturbations.noise import Pixels
from fastmat.types import Batch, ThreatModel

SEVERITIES = 5
KINDS: Mapping[str, Callable[..., Pixels]] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "speckle_noise": noise.speckle_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": weather.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
}
# The five of its six pictures that are drawn from, as published.
FROST_FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")


class Corruption(Perturbation):
    """Images alone, as if taken in bad weather or through a bad lens; the captions stay.

    kind: gaussian_noise, shot_noise, impulse_noise, speckle_noise, defocus_blur, glass_blur, motion_blur, zoom_blur,
        snow, frost, fog, brightness, contrast, elastic_transform, pixelate or jpeg_compression; stylize is an attack
        of its own.
    severity: 1 to 5. Lengths are in pixels of an image of 224, as published.
    frost: a folder of pictures for frost; null: those of the package imagecorruptions.
    Raises UserError for another kind or severity, and where frost has no pictures.
    """

    def __init__(
        self, *, threat: ThreatModel, kind: str, severity: int = 3, frost: Path | None = None, seed: int = 0
    ) -> None:
        super().__init__(threat=threat, severity=severity, severities=SEVERITIES, seed=seed)
        self.kind = chosen(kind, tuple(KINDS))
        self.folder = frost
        if kind == "frost":
            self.check_frost()

    def perturb(self, batch: Batch) -> tuple[Tensor, tuple[str, ...]]:
        place = list(KINDS).index(self.kind)
        more = {"pictures": self.frost} if self.kind == "frost" else {}
        made = [
            KINDS[self.kind](pixels, self.severity - 1, self.generator(place, index), **more)
            for index, pixels in zip(batch.index.tolist(), as_pixels(batch.images), strict=True)
        ]
        return torch.stack([eight_bit(pixels) for pixels in made]).to(batch.images.device), batch.texts

    def frost_files(self) -> list[Path]:
        if self.folder is not None:
            return sorted(path for path in self.folder.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        found = find_spec("imagecorruptions")  # not imported: it cannot be
        package = Path(found.origin).parent if found is not None and found.origin is not None else None
        return [] if package is None else [package / "frost" / name for name in FROST_FILES]

    def check_frost(self) -> None:
        files = self.frost_files()
        if not files or not all(path.is_file() for path in files):
            raise UserError(
                f"frost: {self.folder or 'the package imagecorruptions'} has no pictures of frost; name a folder with "
                "some, or pip install --no-deps imagecorruptions, which has those of ImageNet-C"
            )

    @cached_property
    def frost(self) -> list[Pixels]:
        try:
            return [np.asarray(Image.open(path).convert("RGB")) / 255 for path in self.frost_files()]
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"frost: a picture cannot be read ({error}); remove it or save it anew") from error


def as_pixels(images: Tensor) -> list[Pixels]:
    """[B, 3, H, W] to B arrays [H, W, 3], float64."""
    arrays: list[Pixels] = [image.double().cpu().permute(1, 2, 0).numpy() for image in images]
    return arrays
