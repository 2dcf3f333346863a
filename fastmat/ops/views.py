"""SGA's scale views: noise, bicubic resize to another scale, clamp, bicubic resize back, as small matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def scale_views(
    x: Tensor,
    scales: Sequence[float],
    noise: Tensor,
    *,
    antialias: bool,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """The scaled versions of `x`, [S, B, 3, H, W].

    x [B, 3, H, W] fp32; noise [S, B, 3, H, W] added before resizing. Each view is
    `up(clamp(down(x + noise_s)))`; bicubic resizing is separable, so both directions are products with a constant
    [H', H] matrix, and the backward is deterministic. Equals torchvision's tensor resize to rounding.
    """
    height, width = x.shape[-2:]
    views = []
    for scale, draw in zip(scales, noise, strict=True):
        small = (int(height * scale), int(width * scale))
        down_h = resize_matrix(height, small[0], antialias, x.dtype, x.device)
        down_w = resize_matrix(width, small[1], antialias, x.dtype, x.device)
        up_h = resize_matrix(small[0], height, antialias, x.dtype, x.device)
        up_w = resize_matrix(small[1], width, antialias, x.dtype, x.device)
        view = (down_h @ (x + draw) @ down_w.T).clamp(*bounds)
        views.append(up_h @ view @ up_w.T)
    return torch.stack(views)


@lru_cache(maxsize=64)
def resize_matrix(source: int, target: int, antialias: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[target, source]: the linear map of a one-dimensional bicubic resize, kept where it is used."""
    identity = torch.eye(source).view(1, 1, source, source)
    resized = F.interpolate(identity, size=(target, source), mode="bicubic", align_corners=False, antialias=antialias)
    return resized[0, 0].contiguous().to(device, dtype)
