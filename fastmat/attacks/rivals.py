"""How far wrong captions and images stand before the right ones, when the captions under attack move as well.

`Contrastive` and `Margin` take the right captions from the frozen context, as they were. Here they are those of the
batch as they stand, words already substituted; the wrong captions and images are the context's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastmat.attacks.base import text_features
from fastmat.attacks.objectives import Bound
from fastmat.errors import UserError
from fastmat.models.protocol import ImageState, VisionLanguageModel
from fastmat.types import AttackContext, Batch

Direction = Literal["both", "i2t", "t2i"]


class Rivals:
    """Wrong against right, over the context's rivals and the batch's own captions.

    form: "margin", in cosines: i2t is max over wrong captions - max over own captions; t2i is the mean over own
        captions of the worst wrong image - this image, each counted up to `enough`, so that what is lost for certain
        leaves the gradient to captions that are not. "contrastive": cross-entropy of the image's row, the mean over its
        own captions, and of each own caption's column, their mean.
    directions: "i2t" (the image retrieves captions), "t2i" (captions retrieve it), or the mean of the two.

    An image and a caption are right for each other when the batch pairs them, wrong when their groups differ; other
    captions of the same group count neither way. `bind` raises UserError when an image has no caption in the batch, or
    no wrong caption or image in the context.
    """

    def __init__(
        self,
        *,
        form: Literal["margin", "contrastive"] = "margin",
        directions: Direction = "both",
        enough: float = 0.1,
    ) -> None:
        if form not in ("margin", "contrastive"):
            raise UserError(f"form must be 'margin' or 'contrastive', got {form!r}")
        if directions not in ("both", "i2t", "t2i"):
            raise UserError(f"directions must be 'both', 'i2t' or 't2i', got {directions!r}")
        if not enough >= 0:
            raise UserError(f"enough is a difference of cosines and must not be negative, got {enough}")
        self.form = form
        self.directions = directions
        self.enough = enough

    def bind(self, model: VisionLanguageModel, batch: Batch, context: AttackContext) -> Bound:
        captions = text_features(model, batch.texts).float()
        ways = {"i2t": self._to_captions, "t2i": self._to_images}
        chosen = [way for name, way in ways.items() if self.directions in (name, "both")]
        bound = [way(model.logit_scale.detach(), captions, batch, context) for way in chosen]
        return lambda state: torch.stack([value(state) for value in bound]).mean(0)

    def _to_captions(self, scale: Tensor, captions: Tensor, batch: Batch, context: AttackContext) -> Bound:
        own, there = per_image(captions, batch)
        rivals = context.text_features.float()
        right = same_group("caption", batch.group, context.text_group)

        def value(state: ImageState) -> Tensor:
            features = state.features.float()
            wrong = (features @ rivals.T).masked_fill(right, float("-inf"))
            mine = (features[:, None] * own).sum(2)
            if self.form == "margin":
                return wrong.amax(1) - mine.masked_fill(~there, float("-inf")).amax(1)
            every = torch.cat([wrong, mine.masked_fill(~there, float("-inf"))], 1)
            return (scale * every).logsumexp(1) - scale * mean_of(mine, there)

        return value

    def _to_images(self, scale: Tensor, captions: Tensor, batch: Batch, context: AttackContext) -> Bound:
        own, there = per_image(captions, batch)
        others = captions @ context.image_features.float().T
        others = others.masked_fill(same_group("image", batch.text_group, context.image_group), float("-inf"))
        rivals = others.amax(1) if self.form == "margin" else (scale * others).logsumexp(1)
        rivals, _ = per_image(rivals, batch)

        def value(state: ImageState) -> Tensor:
            mine = (state.features.float()[:, None] * own).sum(2)
            if self.form == "margin":
                return mean_of((rivals - mine).clamp_max(self.enough), there)
            return mean_of(torch.logaddexp(rivals, scale * mine) - scale * mine, there)

        return value


class Standing(NamedTuple):
    """Of B images and their captions against the context. lost [B]: of the image's query and of its captions' queries,
    each direction's share that is lost, added: 0 to 2. margin [B]: the mean of the directions' mean margins."""

    lost: Tensor
    margin: Tensor

    def beats(self, other: Standing) -> Tensor:
        """[B] bool: more queries are lost, or as many by a larger margin than rounding (1e-6) explains."""
        more, as_many = self.lost > other.lost + 1e-6, self.lost > other.lost - 1e-6
        return more | (as_many & (self.margin > other.margin + 1e-6))


@torch.no_grad()
def standing(images: Tensor, captions: Tensor, batch: Batch, context: AttackContext) -> Standing:
    """How adversarial features, images [B, E] and captions [T, E] of `batch`, stand at rank 1. A tie is lost."""
    images, captions = images.float(), captions.float()
    own, there = per_image(captions, batch)
    wrong = images @ context.text_features.float().T
    wrong = wrong.masked_fill(same_group("caption", batch.group, context.text_group), float("-inf"))
    mine = (images[:, None] * own).sum(2)
    tr = wrong.amax(1) - mine.masked_fill(~there, float("-inf")).amax(1)
    others, _ = per_image(nearest_wrong(captions, batch, context)[0], batch)
    ir = others - mine
    lost = (tr >= 0).float() + mean_of((ir >= 0).float(), there)
    return Standing(lost, (tr + mean_of(ir, there)) / 2)


@torch.no_grad()
def nearest_wrong(captions: Tensor, batch: Batch, context: AttackContext) -> tuple[Tensor, Tensor]:
    """Cosine [T] and place [T] in the context of the wrong image that each caption [T, E] of `batch` likes best."""
    others = captions.float() @ context.image_features.float().T
    others = others.masked_fill(same_group("image", batch.text_group, context.image_group), float("-inf"))
    cosine, place = others.max(1)
    return cosine, place


def per_image(values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """[T, ...] of the captions to [B, K, ...] and which of the K are there [B, K]; zeros elsewhere."""
    count = torch.bincount(batch.txt2img, minlength=len(batch))
    if not bool(count.all()):
        raise UserError(f"image {int((count == 0).nonzero()[0])} of the batch has no caption: give each at least one")
    first = count.cumsum(0) - count
    place = torch.arange(len(values), device=values.device) - first[batch.txt2img]
    most = int(count.max())
    padded = values.new_zeros(len(batch), most, *values.shape[1:])
    padded[batch.txt2img, place] = values
    return padded, torch.arange(most, device=values.device) < count[:, None]


def mean_of(values: Tensor, there: Tensor) -> Tensor:
    """Row means of [B, K] over what is there."""
    return values.where(there, 0.0).sum(1) / there.sum(1)


def same_group(what: str, queries: Tensor, gallery: Tensor) -> Tensor:
    """[Q, N] bool. Raises UserError when a query has no rival."""
    same = queries[:, None] == gallery
    if bool(same.all(1).any()):
        raise UserError(
            f"the context holds no wrong {what} for a query of the batch: hand in a gallery of several groups"
        )
    return same


def columns(chosen: Sequence[bool], new: Sequence[str], old: Sequence[str]) -> tuple[str, ...]:
    """`new` where chosen, else `old`."""
    return tuple(a if take else b for take, a, b in zip(chosen, new, old, strict=True))
