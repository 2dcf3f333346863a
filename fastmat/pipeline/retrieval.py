"""The expert that knows captions: which of a gallery says best what is in a picture?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmat.attacks.base import frozen, image_features, text_features
from fastmat.errors import UserError
from fastmat.memory import Chunks
from fastmat.models.protocol import VisionLanguageModel
from fastmat.pipeline.base import Argument
from fastmat.tasks.uncontrasted import contrasts


class Retrieval:
    """The caption of the data whose feature has the largest cosine with the picture's.

    Raises UserError for a model that compares no images with texts.
    """

    description = "Finds the caption, out of a collection of captions, that fits the image best."
    argument: Argument | None = None
    from_gallery = True

    def __init__(self, *, vlm: VisionLanguageModel, gallery: tuple[str, ...]) -> None:
        check_contrasts(vlm)
        self.vlm = vlm
        self.captions = tuple(dict.fromkeys(gallery))
        captions = Chunks(256, item="caption", advice="take a device with more of it, or a smaller model")
        with frozen(vlm):
            parts = captions.run(len(self.captions), lambda a, b: text_features(vlm, self.captions[a:b]))
        self.features = torch.cat(parts).float()

    def answer(self, images: Tensor, arguments: Sequence[str]) -> list[str]:
        with frozen(self.vlm):
            cosine = image_features(self.vlm, images).float() @ self.features.T
        return [self.captions[place] for place in cosine.argmax(1).tolist()]


def check_contrasts(vlm: VisionLanguageModel) -> None:
    """Raises UserError for a model without features that compare images with texts."""
    if not contrasts(vlm):
        raise UserError(
            f"{type(vlm).__name__} does not compare images with texts: take a model that does (open_clip, albef, blip)"
        )
