"""What an image attack ascends: per-sample values, always maximised.

An objective is bound to a batch first (targets are computed once), then called on the image state of every iterate.
Values of different samples are independent, so the gradient of the sum is every sample's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.attacks.base import text_features
from fastmat.errors import UserError
from fastmat.models.protocol import ImageState, VisionLanguageModel, fuses
from fastmat.ops import contrastive_statistics, cosine_to_set
from fastmat.text.encoded import represent
from fastmat.types import AttackContext, Batch

Bound = Callable[[ImageState], Tensor]


class Objective(Protocol):
    def bind(self, model: VisionLanguageModel, batch: Batch, context: AttackContext) -> Bound:
        """A function from the image state of the current iterate to [B] values."""
        ...


class Contrastive:
    """Symmetric InfoNCE of each image against the frozen context, multi-positive.

    Image to text: cross-entropy of the image's row over all context texts, the mean over its positives. Text to image:
    cross-entropy of each matching context text over the *other* groups' frozen images and the live one, their mean.
    """

    def __init__(self, *, directions: Literal["both", "i2t", "t2i"] = "both") -> None:
        self.directions = directions

    def bind(self, model: VisionLanguageModel, batch: Batch, context: AttackContext) -> Bound:
        scale = model.logit_scale.detach()
        # Only texts that match an image of the batch have a term to images: [B, K], padded to the most of one image.
        ordered, order = context.text_group.sort()
        first = torch.searchsorted(ordered, batch.group)
        count = torch.searchsorted(ordered, batch.group, right=True) - first
        if self.directions != "t2i" and not bool(count.all()):
            i = int((count == 0).nonzero()[0])
            raise UserError(f"image {i} of the batch has no positive: no text of the context has its group")
        place = torch.arange(int(count.max()), device=count.device)
        own = order[(first[:, None] + place).clamp_max(len(order) - 1)]
        weight = (place < count[:, None]) / count[:, None].clamp_min(1)
        texts = context.text_features[own]
        texts = texts.to(torch.promote_types(texts.dtype, torch.float32))
        others = contrastive_statistics(
            texts.flatten(0, 1),
            context.image_features,
            scale,
            context.text_group[own].flatten(),
            context.image_group,
            negatives_only=True,
            column_side=False,
        ).row_lse.view(own.shape)

        def value(state: ImageState) -> Tensor:
            total = torch.zeros(len(state.features), device=state.features.device)
            if self.directions != "t2i":
                rows = contrastive_statistics(
                    state.features, context.text_features, scale, batch.group, context.text_group, column_side=False
                )
                total = total + rows.row_lse - rows.row_match / count
            if self.directions != "i2t":
                live = scale * (state.features[:, None] * texts).sum(2)
                total = total + ((torch.logaddexp(others, live) - live) * weight).sum(1)
            return total / 2 if self.directions == "both" else total

        return value


class CosineToOwn:
    """SGA's set-level objective: minus the sum of cosines to all own captions (SGA, ICCV 2023, section 3.3)."""

    def bind(self, model: VisionLanguageModel, batch: Batch, context: AttackContext) -> Bound:
        own = text_features(model, batch.texts)
        return lambda state: -cosine_to_set(state.features, own, batch.txt2img)


class KLFromClean:
    """Uni-modal: KL(softmax(clean embedding) || softmax(embedding)), un-normalised (Co-Attack and Sep-Attack).

    representation: "embeds" for CLIP; "cls" is the un-projected class token of ALBEF's image encoder, "tokens" all.
    Raises UserError where images have no tokens, or no class token among them.
    """

    def __init__(self, *, representation: Literal["features", "embeds", "tokens", "cls"] = "embeds") -> None:
        self.representation = representation

    def bind(self, model: VisionLanguageModel, batch: Batch, context: AttackContext) -> Bound:
        what = self.representation
        if what == "cls" and not fuses(model):
            raise UserError(
                f"the image tokens of {type(model).__name__} begin with no class token; use 'embeds' instead of 'cls'"
            )
        with torch.no_grad():
            target = represent(model.encode_image(batch.images), what).softmax(-1)
        return lambda state: F.kl_div(represent(state, what).log_softmax(-1), target, reduction="none").sum(-1)


class SquaredL2FromClean:
    """Uni-modal: squared distance to the clean embedding, un-normalised and summed over dimensions (FARE)."""

    def bind(self, model: VisionLanguageModel, batch: Batch, context: AttackContext) -> Bound:
        with torch.no_grad():
            target = model.encode_image(batch.images).embeds
        return squared_l2_from(target)


def squared_l2_from(target: Tensor) -> Bound:
    """Squared distance of the embedding to a given [B, E] target."""
    return lambda state: (state.embeds - target).square().sum(-1)
