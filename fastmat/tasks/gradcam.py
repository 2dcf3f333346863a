"""Grad-CAM (Selvaraju et al., ICCV 2017) on cross-attention: where an image the words of a text look, as far as it
speaks for the two matching."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmat.attacks.base import frozen
from fastmat.errors import UserError
from fastmat.models.protocol import FusionModel
from fastmat.types import Batch


def attention_maps(model: FusionModel, batch: Batch, *, layer: int) -> Tensor:
    """[T, g, g], one map over the image's patches for each text of `batch`, on the model's device.

    As in ALBEF's `Grounding.py` (mode "itm"): attention of one layer times the positive part of the gradient of the
    matching logit with respect to it, without the class token of the image, without padding of the text, then the mean
    over heads and text positions. As there, the mean counts padding, so the scale of a map depends on the longest text
    beside it; the order of boxes does not.

    layer: of those that look at the image, from 0; ALBEF's `block_num` 8 is its third, 2.
    Raises UserError for a layer that the model has not, and for patches that form no square.
    """
    device = model.logit_scale.device
    with frozen(model):
        with torch.no_grad():
            image = model.encode_image(batch.images.to(device))
            text = model.encode_text(model.tokenize(batch.texts).to(device))
        assert image.tokens is not None
        # The weights are frozen: the graph begins at the tokens, and reaches no further than the fusion.
        live = image._replace(tokens=image.tokens.detach().requires_grad_())
        with torch.enable_grad():
            fused = model.fuse(live, text, batch.txt2img.to(device), True)
            assert fused.attention is not None
            if not 0 <= layer < len(fused.attention):
                raise UserError(
                    f"layer must be 0 to {len(fused.attention) - 1}, the layers of {type(model).__name__} that look at "
                    f"the image, got {layer}"
                )
            attention = fused.attention[layer]
            (gradient,) = torch.autograd.grad(fused.itm_logits[:, 1].sum(), attention)
    side = math.isqrt(attention.shape[-1] - 1)
    if side * side != attention.shape[-1] - 1:
        raise UserError(f"the {attention.shape[-1] - 1} patches of {type(model).__name__} form no square")
    heat = attention.detach() * gradient.clamp(min=0) * text.mask[:, None, :, None]
    return heat[..., 1:].mean((1, 2)).unflatten(1, (side, side))
