"""The attack on a captioner: it shall no longer say what humans say of the image."""

from __future__ import annotations

import torch

from fastmat.attacks.objectives import Bound
from fastmat.errors import UserError
from fastmat.models.protocol import CaptioningModel, VisionLanguageModel, captions_images
from fastmat.types import AttackContext, Batch


def captioning_model(model: VisionLanguageModel) -> CaptioningModel:
    """The same model. Raises UserError when it writes no captions."""
    if not captions_images(model):
        raise UserError(f"{type(model).__name__} writes no captions: take a model that does (blip_captioner)")
    return model


class CaptionLoss:
    """Cross-entropy per word of the image's own captions under the captioner, each word given those before it
    (teacher forcing), the mean over the captions: the captioner's training loss without label smoothing.

    Raises UserError for a model that writes no captions. It does not look at the context.
    """

    def bind(self, model: VisionLanguageModel, batch: Batch, context: AttackContext) -> Bound:
        captioner, owner = captioning_model(model), batch.txt2img
        tokens = captioner.tokenize(batch.texts).to(owner.device)
        # A product, because index_add_ has no fixed order on a GPU. [B, T], each row sums to one.
        belongs = (owner == torch.arange(len(batch), device=owner.device)[:, None]).float()
        belongs = belongs / belongs.sum(1, keepdim=True).clamp_min(1)
        return lambda image: belongs @ captioner.caption_losses(image, tokens, owner)
