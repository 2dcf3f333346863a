"""Visual grounding: which of a detector's boxes does an expression mean? As ALBEF judges it on RefCOCO+, weakly
supervised: the box that holds most of the Grad-CAM (Li et al., NeurIPS 2021, section 6.4; `Grounding.py`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.data.captions import CaptionRule
from fastmat.data.grounding import read_grounding_set
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel, fuses
from fastmat.tasks.base import Judged, share
from fastmat.tasks.gradcam import attention_maps
from fastmat.types import Batch

AREA_POWER = 0.5  # the published script's alpha: heat in a box is divided by its area to this power
RIGHT_FROM = 0.5  # intersection over union with the referred object


class Grounding:
    """RefCOCO+ and its like. An expression is right when the box chosen overlaps the true one by half (IoU 0.5).

    annotations: ALBEF's `refcoco+_val.json`, `refcoco+_test.json`. refs: `refs(unc).p`. instances: `instances.json`.
    detections: `dets.json`. images: the folder that image paths start from. title: as the tables shall name it.
    layer: whose attention is read, counted among those that look at the image; 2 is ALBEF's `block_num` 8.
    captions: pre-processing of expressions.
    Published: pictures of 384 px, accuracy on val, testA and testB. Where no box has a positive score, or there is no
        box, the published script keeps the box of the expression before; here the highest score is taken whatever its
        sign, and without a box the answer is wrong.
    """

    name = "grounding"

    def __init__(
        self,
        *,
        annotations: tuple[Path, ...],
        refs: Path,
        instances: Path,
        detections: Path,
        images: Path,
        title: str = "refcoco+",
        layer: int = 2,
        captions: CaptionRule = "albef",
    ) -> None:
        self.set = read_grounding_set(
            annotations,
            refs=refs,
            instances=instances,
            detections=detections,
            images=images,
            name=title,
            captions=captions,
        )
        self.data = self.set.pairs
        self.picture = self.set.picture
        self.layer = layer
        self.wanted = ("",) * self.data.n_images
        self.wanted_boxes = tuple(
            part_of_picture(box, size) for box, size in zip(self.set.target, self.set.size, strict=True)
        )

    def check(self, model: VisionLanguageModel) -> None:
        if not fuses(model):
            raise UserError(
                f"{type(model).__name__} does not look at images with words, which grounding is read from: take a "
                "model that does (albef, blip)"
            )

    def judge(self, model: VisionLanguageModel, batches: Iterable[Batch]) -> Judged:
        self.check(model)
        assert fuses(model)
        chosen: list[Tensor] = []
        for batch in batches:
            maps = attention_maps(model, batch, layer=self.layer).float().cpu()
            for row, heat in zip(batch.index.tolist(), maps, strict=True):
                boxes = self.set.boxes[row]
                best = int(box_scores(heat, boxes, self.set.size[row]).argmax()) if len(boxes) else None
                chosen.append(boxes.new_zeros(4) if best is None else boxes[best])
        right = overlap(torch.stack(chosen), self.set.target[: len(chosen)]) >= RIGHT_FROM
        parts = self.set.part[: len(chosen)]
        metrics = {
            part: share(right, torch.tensor([other == part for other in parts])) for part in dict.fromkeys(parts)
        }
        return Judged(
            metrics=metrics,
            right=right,
            said=("",) * len(chosen),
            boxes=tuple(part_of_picture(*pair) for pair in zip(chosen, self.set.size[: len(chosen)], strict=True)),
        )


def box_scores(heat: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """[K]: the heat in each of boxes [K, 4] over the square root of its area.

    heat: [g, g], enlarged to the `size` (height, width) of the picture, bicubic. Corners are cut to whole pixels, the
    area is that of the uncut box, both as published.
    """
    grown = F.interpolate(heat[None, None], size=size, mode="bicubic", align_corners=False)[0, 0].double()
    summed = F.pad(grown.cumsum(0).cumsum(1), (1, 0, 1, 0))
    x, y, width, height = boxes.unbind(1)
    left, right = (side.long().clamp(0, size[1]) for side in (x, x + width))
    top, bottom = (side.long().clamp(0, size[0]) for side in (y, y + height))
    inside = summed[bottom, right] - summed[top, right] - summed[bottom, left] + summed[top, left]
    return inside / (width * height) ** AREA_POWER


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes a, b [N, 4], as [N]: the sides of an intersection count their last pixel, those
    of the boxes do not, as RefCOCO's own evaluation has it.

    >>> overlap(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[0.0, 0, 4, 2]]))
    tensor([0.5000])
    """
    low = torch.maximum(a[:, :2], b[:, :2])
    high = torch.minimum(a[:, :2] + a[:, 2:] - 1, b[:, :2] + b[:, 2:] - 1)
    common = torch.where((low < high).all(1), (high - low + 1).prod(1), 0.0)
    return common / (a[:, 2:].prod(1) + b[:, 2:].prod(1) - common)


def part_of_picture(box: Tensor, size: tuple[int, int]) -> tuple[float, ...]:
    """x, y, width, height in pixels as parts of a picture of height and width `size`."""
    return tuple((box / box.new_tensor([size[1], size[0], size[1], size[0]])).tolist())
