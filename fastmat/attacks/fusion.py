"""Attacks on what a fusion model makes of an image and a text together: its first fused token, [P, D]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.attacks.objectives import Bound
from fastmat.attacks.word_substitution import TextPlan, WordSubstitution
from fastmat.errors import UserError
from fastmat.models.protocol import FusionModel, ImageState, TextTokens, VisionLanguageModel, fuses
from fastmat.text.fused import FusedTexts
from fastmat.types import AttackContext, Batch


def fusion_model(model: VisionLanguageModel) -> FusionModel:
    """The same model. Raises UserError when it has no fusion encoder."""
    if not fuses(model):
        raise UserError(
            f"{type(model).__name__} does not fuse images with texts, so representation 'fusion' is not there: "
            "take a model that does (albef, blip), or 'embeds'"
        )
    return model


def plan_of(words: WordSubstitution, model: VisionLanguageModel, batch: Batch) -> TextPlan:
    """The plan of a search on the captions of `batch`, beside their clean images where the search looks at them.

    `Quirks.raw_images`: it looks at pixels that were never normalised.
    """
    if words.judged != "fusion":
        return words.plan(model, batch.texts)
    fusing, images = fusion_model(model), batch.images
    if words.quirks.raw_images:
        images = images * fusing.std + fusing.mean  # what the model then takes away
    with torch.no_grad():
        image = fusing.encode_image(images)
    return words.plan(model, batch.texts, fused=FusedTexts(fusing, image, batch.txt2img.tolist()))


class FusedCaptions:
    """Captions, encoded once, to be fused with ever new states of their `count` images.

    tokens: T captions; owner: [T], caption to image row.
    """

    def __init__(self, model: FusionModel, tokens: TextTokens, owner: Tensor, count: int) -> None:
        self.model = model
        self.owner = owner
        with torch.no_grad():
            self.text = model.encode_text(tokens.to(owner.device))
        # A product, because index_add_ has no fixed order on a GPU. [count, T], each row sums to one.
        belongs = (owner == torch.arange(count, device=owner.device)[:, None]).float()
        self.belongs = belongs / belongs.sum(1, keepdim=True).clamp_min(1)

    def __call__(self, image: ImageState) -> Tensor:
        """[T, D]."""
        return self.model.fuse(image, self.text, self.owner).tokens[:, 0]

    def mean(self, values: Tensor) -> Tensor:
        """[T] to [count], the mean over each image's captions; 0 for an image without any."""
        return self.belongs @ values


def kl_from(target: Tensor, rows: Tensor) -> Tensor:
    """KL(target || softmax(row)) of [T, D] distributions and rows, as [T]."""
    return F.kl_div(rows.log_softmax(-1), target, reduction="none").sum(-1)


class KLFusedFromClean:
    """KL(softmax(clean fused token) || softmax(fused token)), the mean over the captions of an image (Sep-Attack on the
    output of a fusion encoder; Zhang et al., ACM MM 2022). The texts stay as they are."""

    def bind(self, model: VisionLanguageModel, batch: Batch, context: AttackContext) -> Bound:
        fusing = fusion_model(model)
        captions = FusedCaptions(fusing, fusing.tokenize(batch.texts), batch.txt2img, len(batch))
        with torch.no_grad():
            clean = captions(fusing.encode_image(batch.images)).softmax(-1)
        return lambda image: captions.mean(kl_from(clean, captions(image)))
