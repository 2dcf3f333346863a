"""The expert that writes: a caption of the picture, in its own words."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmat.attacks.base import frozen
from fastmat.attacks.caption_loss import captioning_model
from fastmat.models.protocol import VisionLanguageModel
from fastmat.pipeline.base import Argument


class Captioning:
    """What a captioner says, by its own beam search. Raises UserError for a model that writes no captions."""

    description = "Describes the image in a sentence."
    argument: Argument | None = None
    from_gallery = False

    def __init__(self, *, vlm: VisionLanguageModel) -> None:
        self.captioner = captioning_model(vlm)

    def answer(self, images: Tensor, arguments: Sequence[str]) -> list[str]:
        with frozen(self.captioner):
            return self.captioner.generate(images)
