"""SGA's linear objective: the sum of cosines between an image and its own captions."""

from __future__ import annotations

from torch import Tensor


def cosine_to_set(image_features: Tensor, text_features: Tensor, txt2img: Tensor) -> Tensor:
    """[B] sums over the captions of each image of <image, caption>.

    image_features [B, E], text_features [T, E] unit rows, txt2img [T] int64. The captions are summed first, so the
    B x T matrix never exists and the gradient's seed is one constant vector per image.
    """
    target = image_features.new_zeros(image_features.shape).index_add_(0, txt2img, text_features.to(image_features))
    return (image_features * target).sum(-1)
