"""How far a wrong caption stands before the right ones: the margin of image-to-text retrieval at rank 1."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmat.attacks.objectives import Bound
from fastmat.errors import UserError
from fastmat.models.protocol import ImageState, VisionLanguageModel
from fastmat.types import AttackContext, Batch


class Margin:
    """max over wrong captions t of cos(x, t)  -  max over right captions t of cos(x, t), over the context's texts.

    A caption is right for an image when their groups are equal. Positive: retrieval at rank 1 is lost; zero: a tie.
    Values lie in [-2, 2]. Gradients are shared evenly by captions that tie for a maximum.

    `bind` raises UserError when an image has no right or no wrong caption in the context.
    """

    def bind(self, model: VisionLanguageModel, batch: Batch, context: AttackContext) -> Bound:
        texts = context.text_features
        texts = texts.to(torch.promote_types(texts.dtype, torch.float32))
        ordered, order = context.text_group.sort()
        first = torch.searchsorted(ordered, batch.group)
        count = torch.searchsorted(ordered, batch.group, right=True) - first
        if not bool(((count > 0) & (count < len(order))).all()):
            raise UserError(
                f"context must hold a right and a wrong caption for every image to have a margin, but among its "
                f"{len(order)} texts the right ones per image are {int(count.min())} to {int(count.max())}"
            )
        # [B, K] places of the right captions; an image with fewer than K names its last one again.
        place = torch.arange(int(count.max()), device=count.device)
        right = order[first[:, None] + torch.minimum(place, count[:, None] - 1)]

        def value(state: ImageState) -> Tensor:
            similarity = state.features.to(texts.dtype) @ texts.T
            wrong = similarity.scatter(1, right, float("-inf"))
            return wrong.amax(1) - similarity.gather(1, right).amax(1)

        return value
