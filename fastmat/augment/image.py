"""More views of the images of a batch, made on its device: a random crop, then RandAugment (Cubuk et al., 2020).

RandAugment applies `operations` operations in a row, each drawn uniformly from a list, all at one `magnitude`, with a
random sign where there are two. The list is the one of ALBEF's and BLIP's training, which leaves out what recolours a
picture outright (colour, posterize, solarize), since captions name colours. They also flip; here that is left out,
since captions say left and right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.errors import UserError
from fastmat.types import Batch

# Views of one image need draws of their own; positions in a set stay far below.
VIEW = 1 << 40
# Ranges at full magnitude: shear, rotation and factor are RandAugment's, the shift is ALBEF's 10 pixels of 256.
SHEAR, DEGREES, SHIFT, FACTOR = 0.3, 30.0, 10 / 256, 0.9
GREY = 0.5  # what comes into the picture from outside
# Height to width, as in the crops that ImageNet models are trained with (Szegedy et al., 2015).
RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True, kw_only=True)
class ImageViews:
    """`augment(batch, draws) -> Batch` with `views` more images per image, in the group of the one they show.

    keep: whether the images themselves stay; False: the first view of each takes its place.
    crop: smallest and largest area of the crop, as a share of the image (ALBEF: 0.5 to 1), resized back; 1 to 1: none.
    operations, magnitude: RandAugment's N and M, M from 0 to 1 (ALBEF: 2 and 7 of 10).

    Rows are the batch's own first, then the further views; captions keep their image, and what an attack draws for a
    view is keyed by an index that no image of a set has. Raises UserError for values out of range.
    """

    views: int = 1
    keep: bool = True
    crop: tuple[float, float] = (0.5, 1.0)
    operations: int = 2
    magnitude: float = 0.7

    def __post_init__(self) -> None:
        if self.views < 1:
            raise UserError(f"views must be at least 1, got {self.views}")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise UserError(f"crop must be (smallest, largest) share of the area, 0 to 1, got {self.crop}")
        if self.operations < 0 or not 0 <= self.magnitude <= 1:
            raise UserError(
                f"operations must not be negative and magnitude must lie in [0, 1], got {self.operations} and "
                f"{self.magnitude}"
            )

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        # The one wait for the device, before anything of a step is queued; all that follows is drawn on the host.
        index = batch.index.cpu()
        views = [self.view(batch.images, index + VIEW * copy, draws) for copy in range(1, self.views + 1)]
        indices = [batch.index + VIEW * copy for copy in range(1, self.views + 1)]
        if self.keep:
            views, indices = [batch.images, *views], [batch.index, *indices]
        return Batch(
            images=torch.cat(views),
            texts=batch.texts,
            txt2img=batch.txt2img,
            index=torch.cat(indices),
            group=batch.group.repeat(len(views)),
        )

    def view(self, images: Tensor, index: Tensor, draws: Draws) -> Tensor:
        """One view of each of [B, 3, H, W]; index [B] int64 on the CPU keys the draws."""
        done = images
        if self.crop[0] < 1:
            box = crop_box(draws.uniform("augment/crop", index, (4,)), self.crop)
            done = resampled(done, box, outside="border")  # a crop at the edge mixes no grey in
        for place in range(self.operations):
            drawn = draws.uniform(f"augment/operation-{place}", index, (2,))
            chosen = ((drawn[:, 0] + 1) / 2 * len(OPERATIONS)).long().clamp_max(len(OPERATIONS) - 1)
            level = self.magnitude * torch.where(drawn[:, 1] < 0, -1.0, 1.0)
            done = each(done, chosen, level)
        return done


def each(images: Tensor, chosen: Tensor, level: Tensor) -> Tensor:
    """Every image under its own operation: images [B, 3, H, W], chosen [B] int64 and level [B] on the CPU."""
    done = images.clone()
    level = level.to(images.device, non_blocking=True)
    for number, operation in enumerate(OPERATIONS.values()):
        rows = (chosen == number).nonzero().flatten()
        if len(rows) and operation is not None:
            rows = rows.to(images.device, non_blocking=True)
            done[rows] = operation(images[rows], level[rows])
    return done


def crop_box(drawn: Tensor, scale: tuple[float, float]) -> Tensor:
    """[B, 2, 3], where the corners of the result come from, of four draws [B, 4] in (-1, 1): area, ratio, place.

    Area is uniform, the ratio log-uniform; a side longer than the image's is cut to it.
    """
    area = scale[0] + (scale[1] - scale[0]) * (drawn[:, 0] + 1) / 2
    low, high = torch.tensor(RATIO).log()
    ratio = (low + (high - low) * (drawn[:, 1] + 1) / 2).exp()
    side = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp_max(1)
    return torch.cat([torch.diag_embed(side), (drawn[:, 2:] * (1 - side))[..., None]], 2)


def resampled(images: Tensor, maps: Tensor, *, outside: Literal["zeros", "border"] = "zeros") -> Tensor:
    """Bilinear; maps [B, 2, 3] say where a pixel of the result comes from, in coordinates from -1 to 1, x first."""
    maps = maps.to(images.device, images.dtype, non_blocking=True)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    # Less grey, so that the zeros outside are grey.
    return F.grid_sample(images - GREY, grid, mode="bilinear", padding_mode=outside, align_corners=False) + GREY


def affine(entries: Callable[[Tensor], Mapping[tuple[int, int], Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
    """An operation that moves pixels: `entries` of the level [B] differ from those of the identity [B, 2, 3]."""

    def operation(images: Tensor, level: Tensor) -> Tensor:
        maps = torch.eye(2, 3, device=level.device).repeat(len(level), 1, 1)
        for (row, column), value in entries(level).items():
            maps[:, row, column] = value
        return resampled(images, maps)

    return operation


def rotation(level: Tensor) -> Mapping[tuple[int, int], Tensor]:
    """About the centre; images are square, as models want them."""
    angle = torch.deg2rad(level * DEGREES)
    return {(0, 0): angle.cos(), (0, 1): -angle.sin(), (1, 0): angle.sin(), (1, 1): angle.cos()}


def blended(images: Tensor, other: Tensor, level: Tensor) -> Tensor:
    """`1 + FACTOR * level` times the image, the rest `other`: away from it or towards it."""
    factor = (1 + FACTOR * level).view(-1, 1, 1, 1).to(images.dtype)
    return torch.lerp(other, images, factor).clamp_(0, 1)


def brightness(images: Tensor, level: Tensor) -> Tensor:
    return blended(images, torch.zeros_like(images), level)


def sharpness(images: Tensor, level: Tensor) -> Tensor:
    """Against Pillow's smoothing, 3 x 3 with 5 in the middle of 13; the border stays."""
    kernel = images.new_ones(3, 1, 3, 3)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel / 13, groups=3)
    return blended(images, smooth, level)


def autocontrast(images: Tensor, level: Tensor) -> Tensor:
    """Each channel stretched to [0, 1]; one that is constant stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp_min(1e-6), images).clamp_(0, 1)


def equalize(images: Tensor, level: Tensor) -> Tensor:
    """Each channel's 8-bit histogram flattened, as Pillow does; a channel with one value stays."""
    values = (images * 255).round_().long().flatten(0, 1).flatten(1)
    counts = values.new_zeros(len(values), 256).scatter_add_(1, values, torch.ones_like(values))
    last = counts.gather(1, values.amax(1, keepdim=True))
    step = (values.shape[1] - last) // 255
    before = counts.cumsum(1) - counts
    table = torch.where(step > 0, (before + step // 2) // step.clamp_min(1), torch.arange(256, device=values.device))
    return table.clamp_max(255).gather(1, values).view_as(images).to(images.dtype) / 255


# None: the image stays. Level is in [-1, 1].
OPERATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "identity": None,
    "autocontrast": autocontrast,
    "equalize": equalize,
    "brightness": brightness,
    "sharpness": sharpness,
    "shear_x": affine(lambda level: {(0, 1): SHEAR * level}),
    "shear_y": affine(lambda level: {(1, 0): SHEAR * level}),
    "translate_x": affine(lambda level: {(0, 2): 2 * SHIFT * level}),
    "translate_y": affine(lambda level: {(1, 2): 2 * SHIFT * level}),
    "rotate": affine(rotation),
}
