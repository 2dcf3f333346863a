"""The values that travel between the parts: threat model, image rule, batch, attack context, attack result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fastmat.errors import UserError

if TYPE_CHECKING:
    from PIL import Image  # `fastmat.ops` imports this module and must need torch alone

Norm = Literal["linf", "l2"]


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """Both budgets of an attack.

    eps: radius around the clean image in [0, 1] pixel units, in `norm` (per image for "l2").
    max_words: how many source words of a caption may be substituted.
    bounds: the pixel box.
    """

    eps: float = 2 / 255
    norm: Norm = "linf"
    max_words: int = 1
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise UserError(f"norm must be 'linf' or 'l2', got {self.norm!r}")
        if not self.eps >= 0:
            raise UserError(f"eps must not be negative, got {self.eps}")
        if self.norm == "linf" and self.eps >= 1:
            raise UserError(
                f"eps={self.eps:g} looks like 8-bit pixel units, but eps is in [0, 1] units: write {self.eps:g}/255"
            )
        if self.max_words < 0:
            raise UserError(f"max_words must not be negative, got {self.max_words}")
        if not self.bounds[0] < self.bounds[1]:
            raise UserError(f"bounds must be (low, high) with low < high, got {self.bounds}")


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """How a model wants pictures: RGB, `size` x `size`, whole image squashed or short side resized and centre cropped.

    Resizing is Pillow's, with antialiasing, as the published models were trained.
    """

    size: int
    mode: Literal["squash", "crop"] = "squash"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB picture to uint8 [3, size, size]."""
        from PIL.Image import Resampling

        resample = Resampling.BICUBIC if self.interpolation == "bicubic" else Resampling.BILINEAR
        if self.mode == "squash":
            image = image.resize((self.size, self.size), resample)
        else:
            short = min(image.size)
            # torchvision's rounding, which CLIP and its descendants were trained with: one pixel less moves the crop.
            width, height = (int(self.size * side / short) for side in image.size)
            left, top = round((width - self.size) / 2), round((height - self.size) / 2)
            image = image.resize((width, height), resample).crop((left, top, left + self.size, top + self.size))
        flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return flat.view(self.size, self.size, 3).permute(2, 0, 1).contiguous()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B images and their T captions.

    images: [B, 3, H, W] fp32 in [0, 1].
    texts: T captions; the captions of one image stand together, in image order.
    txt2img: [T] int64, caption to image row.
    index: [B] int64, position of each image in its set; random draws are keyed by it.
    group: [B] int64; an image and a caption match when their groups are equal (1:N and N:1).
    """

    images: Tensor
    texts: tuple[str, ...]
    txt2img: Tensor
    index: Tensor
    group: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def text_group(self) -> Tensor:
        """[T] int64, the group of each caption."""
        return self.group[self.txt2img]

    def rows(self, start: int, stop: int) -> Batch:
        """The images `start:stop` with their captions."""
        keep = ((self.txt2img >= start) & (self.txt2img < stop)).nonzero().flatten().tolist()
        return Batch(
            images=self.images[start:stop],
            texts=tuple(self.texts[t] for t in keep),
            txt2img=self.txt2img[keep] - start,
            index=self.index[start:stop],
            group=self.group[start:stop],
        )

    def replace(self, *, images: Tensor | None = None, texts: tuple[str, ...] | None = None) -> Batch:
        """The same pairs with other images or other texts."""
        return replace(
            self,
            images=self.images if images is None else images,
            texts=self.texts if texts is None else texts,
        )

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            txt2img=self.txt2img.to(device, non_blocking=True),
            index=self.index.to(device, non_blocking=True),
            group=self.group.to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True)
class AttackContext:
    """Frozen unit features of the surrogate that an objective contrasts a sample with.

    Built once for a whole batch (or a gallery), so that splitting the batch never changes a result.

    image_features [N, E], image_group [N]; text_features [M, E], text_group [M].
    """

    image_features: Tensor
    image_group: Tensor
    text_features: Tensor
    text_group: Tensor


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """What an attack made, checked against both budgets.

    images: [B, 3, H, W] fp32; texts: T captions.
    distance: [B] fp32, distance to the clean image in the threat model's norm, measured on `images`.
    words_changed: [T] int64 on the CPU, substituted source words.
    """

    images: Tensor
    texts: tuple[str, ...]
    distance: Tensor
    words_changed: Tensor
