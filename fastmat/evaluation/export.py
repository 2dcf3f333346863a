"""An adversarial set as 8-bit pictures, still within its budget.

DIR/images/00000.png ...   the adversarial images, at the resolution that was attacked
DIR/annotations.json       a `json` data set: [{"image", "caption": [adversarial captions], "image_id", "group"}]
DIR/manifest.json          `Exported`: what was exported, and how far rounding moved it
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import BaseModel, Field
from torch import Tensor

from fastmat.evaluation.adversarial_set import AdversarialSet
from fastmat.evaluation.results import STRICT, Threat, to_json, write_atomic
from fastmat.types import Batch

# Far above the rounding of eps * 255 in double precision, far below a level.
SLACK = 1e-9


class ExportedImage(BaseModel):
    """distance, distance_8bit: of the stored and of the exported image from the clean one, in the threat's norm and
    units; moved: largest rounding of a pixel, in 8-bit levels."""

    model_config = STRICT
    file: str
    image: str
    distance: float = Field(ge=0)
    distance_8bit: float = Field(ge=0)
    moved: float = Field(ge=0)


class Exported(BaseModel):
    """moved_max, moved_mean: by rounding, over all pixels, in 8-bit levels (1/255)."""

    model_config = STRICT
    format: Literal["fastmat 8-bit export 1"] = "fastmat 8-bit export 1"
    surrogate: str
    attack: str
    threat: Threat
    dataset: str
    split: str
    seed: int
    config_sha256: str
    moved_max: float = Field(ge=0)
    moved_mean: float = Field(ge=0)
    images: list[ExportedImage]

    @property
    def distance_8bit(self) -> float:
        """The largest."""
        return max(image.distance_8bit for image in self.images)


def to_8bit(images: Tensor, clean: Tensor, *, threat: Threat) -> Tensor:
    """Each pixel's nearest 8-bit level among those that keep the image within the budget.

    images [B, 3, H, W] fp32 in [0, 1], within the budget; clean [B, 3, H, W] uint8, the images they were made of.
    Returns uint8 [B, 3, H, W]. With "linf" no pixel is more than floor(255 eps) levels away, so that nothing moves
    below 1/255; with "l2" pixels are rounded towards the clean image, those first whose error grows least for the
    distance gained, until the sum of squared levels is at most (255 eps)^2.
    """
    origin = clean.to(torch.int64)
    exact = images.double() * 255
    if threat.norm == "linf":
        levels = math.floor(threat.eps * 255 + SLACK)
        near = exact.round().to(torch.int64).clamp(0, 255)
        return near.clamp(origin - levels, origin + levels).to(torch.uint8)
    delta = exact - origin
    most = math.floor((threat.eps * 255) ** 2 + SLACK)
    moved = torch.stack([within_l2(row, most) for row in delta.flatten(1)]).view_as(delta)
    return (origin + moved).to(torch.uint8)


def within_l2(delta: Tensor, most: int) -> Tensor:
    """Whole numbers near `delta` [P] float64, none beyond it by a level, whose squares sum to at most `most`. int64."""
    size = delta.abs()
    near = size.round()
    while (excess := int((near**2).sum()) - most) > 0:
        # One level towards zero: what it gains in squares, and what it costs in rounding.
        gain = 2 * near - 1
        cost = (size - (near - 1)).abs() - (size - near).abs()
        order = torch.where(near > 0, cost / gain.clamp(min=1), torch.inf).argsort()
        gained = gain[order].clamp(min=0).cumsum(0)
        count = int((gained < excess).sum()) + 1
        near[order[: min(count, int((near > 0).sum()))]] -= 1
    return (near * delta.sign()).to(torch.int64)


def export_set(stored: AdversarialSet, clean: Iterable[Batch], out: Path, *, ids: Sequence[str]) -> Exported:
    """Write `out`; `clean`: the images that were attacked, in set order, at the resolution of the set, and their `ids`.

    Raises UserError when the stored images are not within their budget of the clean ones.
    """
    made = stored.manifest
    stored.check_budget(clean)
    images: list[ExportedImage] = []
    annotations: list[dict[str, object]] = []
    total, pixels = 0.0, 0
    originals = (image for batch in clean for image in batch.images)
    for part in stored:
        pairs = part.pairs
        # They were 8-bit levels before they were divided by 255.
        origin = torch.stack([next(originals) for _ in range(len(pairs))]).mul(255).round().to(torch.uint8)
        rounded = pairs.images.double().mul(255).round().to(torch.uint8)
        final = to_8bit(pairs.images, origin, threat=made.threat) if made.threat.budgeted else rounded
        moved = (final - pairs.images.double() * 255).abs()
        total, pixels = total + float(moved.sum()), pixels + moved.numel()
        levels = (final.to(torch.int64) - origin.to(torch.int64)).flatten(1)
        linf, l2 = levels.abs().amax(1), levels.square().sum(1).double().sqrt()
        captions: list[list[str]] = [[] for _ in range(len(pairs))]
        for text, owner in zip(pairs.texts, pairs.txt2img.tolist(), strict=True):
            captions[owner].append(text)
        for row in range(len(pairs)):
            file = f"images/{len(images):05d}.png"
            write_atomic(out / file, png_bytes(final[row]))
            name = ids[len(images)]
            images.append(
                ExportedImage(
                    file=file,
                    image=name,
                    distance=float(part.distance[row]),
                    distance_8bit=float(linf[row] if made.threat.norm == "linf" else l2[row]) / 255,
                    moved=float(moved[row].max()),
                )
            )
            group = str(int(pairs.group[row]))
            annotations.append({"image": file, "caption": captions[row], "image_id": name, "group": group})
    exported = Exported(
        surrogate=made.surrogate,
        attack=made.attack,
        threat=made.threat,
        dataset=made.dataset,
        split=made.split,
        seed=made.seed,
        config_sha256=made.config_sha256,
        moved_max=max(image.moved for image in images),
        moved_mean=total / pixels,
        images=images,
    )
    write_atomic(out / "annotations.json", (json.dumps(annotations, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomic(out / "manifest.json", to_json(exported))
    return exported


def png_bytes(image: Tensor) -> bytes:
    """uint8 [3, H, W] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()
