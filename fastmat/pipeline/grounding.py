"""The expert that points: where in the picture is what a phrase names? By Grad-CAM, as ALBEF grounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel, fuses
from fastmat.pipeline.base import Argument
from fastmat.tasks.gradcam import attention_maps
from fastmat.types import Batch

# A coarse answer: a map of a few patches a side points no finer, and boxes would differ with every attack (this
# project's choice).
REGIONS = (
    "upper left", "top", "upper right",
    "left", "centre", "right",
    "lower left", "bottom", "lower right",
)  # fmt: skip
NOWHERE = "nowhere"


class Grounding:
    """The ninth of the picture, by name, that holds most of the Grad-CAM of `fastmat.tasks.gradcam`; "nowhere" where
    nothing speaks for the phrase.

    layer: whose attention is read, counted among those that look at the image; 2 is ALBEF's `block_num` 8.
    Raises UserError for a model that does not look at images with words, and for a layer that it has not.
    """

    description = "Tells in which part of the image something is, such as 'upper left' or 'centre'."
    argument: Argument | None = Argument(name="phrase", description="what to look for, such as 'a red ball'")
    from_gallery = False

    def __init__(self, *, vlm: VisionLanguageModel, layer: int = 2) -> None:
        if not fuses(vlm):
            raise UserError(
                f"{type(vlm).__name__} does not look at images with words, which grounding is read from: take a model "
                "that does (albef, blip)"
            )
        self.vlm = vlm
        self.layer = layer
        size = vlm.image_transform.size
        self.answer(torch.zeros(1, 3, size, size, device=vlm.logit_scale.device), ["a"])  # the layer, checked at once

    def answer(self, images: Tensor, arguments: Sequence[str]) -> list[str]:
        assert fuses(self.vlm)
        rows = torch.arange(len(images))
        batch = Batch(images=images, texts=tuple(arguments), txt2img=rows, index=rows, group=rows)
        return regions(attention_maps(self.vlm, batch, layer=self.layer))


def regions(maps: Tensor) -> list[str]:
    """The name of the ninth with most heat, for each of maps [B, g, g] that are nowhere negative.

    >>> heat = torch.zeros(2, 6, 6)
    >>> heat[0, 0, 5] = 1
    >>> regions(heat)
    ['upper right', 'nowhere']
    """
    ninths = F.adaptive_avg_pool2d(maps.float(), 3).flatten(1)
    best, place = ninths.max(1)
    return [REGIONS[i] if heat > 0 else NOWHERE for heat, i in zip(best.tolist(), place.tolist(), strict=True)]
