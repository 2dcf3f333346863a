"""Attacks on the matching head of a fusion model: an image shall not match its own captions."""

from __future__ import annotations

import math

from torch import Tensor

from fastmat.attacks.fusion import FusedCaptions, fusion_model
from fastmat.attacks.objectives import Bound, Contrastive
from fastmat.errors import UserError
from fastmat.models.protocol import ImageState, VisionLanguageModel
from fastmat.types import AttackContext, Batch


class ITM:
    """-log p(match), the mean over the captions of an image; it does not look at the context.

    Raises UserError for a model that does not fuse.
    """

    def bind(self, model: VisionLanguageModel, batch: Batch, context: AttackContext) -> Bound:
        fusing = fusion_model(model)
        captions = FusedCaptions(fusing, fusing.tokenize(batch.texts), batch.txt2img, len(batch))

        def value(image: ImageState) -> Tensor:
            logits = fusing.fuse(image, captions.text, captions.owner).itm_logits
            return captions.mean(-logits.log_softmax(-1)[:, 1])

        return value


class ITCAndITM:
    """itc * `contrastive` + itm * `itm`: both losses that a fusion model is trained by.

    Raises UserError for weights that are negative or both zero.
    """

    def __init__(self, *, itc: float = 1.0, itm: float = 1.0) -> None:
        if not (itc >= 0 and itm >= 0 and 0 < itc + itm < math.inf):
            raise UserError(
                f"itc and itm must be finite and not negative, and one must be positive; got {itc} and {itm}"
            )
        self.itc, self.itm = itc, itm

    def bind(self, model: VisionLanguageModel, batch: Batch, context: AttackContext) -> Bound:
        contrast = Contrastive().bind(model, batch, context)
        matching = ITM().bind(model, batch, context)
        return lambda image: self.itc * contrast(image) + self.itm * matching(image)
