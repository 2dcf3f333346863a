"""InfoNCE with any number of positives on both sides (1:N and N:1)."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_logits(rows: Tensor, columns: Tensor, logit_scale: Tensor | float) -> Tensor:
    """[N, M] scaled dot products of rows [N, E] and columns [M, E]: fp32 (fp64 for fp64 rows), also inside autocast.

    In bf16 a cosine near 1 is known to 1/256, which at scale 100 leaves 0.4 of doubt in a logit.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        return logit_scale * (rows.to(dtype) @ columns.to(dtype).T)


def contrastive_rows(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor | float,
    *,
    row_group: Tensor,
    column_group: Tensor,
    soft_rows: Tensor | None = None,
    alpha: float = 0.0,
) -> Tensor:
    """[N] cross-entropies of each row over all columns; the target is uniform over the columns of the row's group.

    rows [N, E], columns [M, E] unit features; row_group [N], column_group [M] int64. A row without positives gets 0.
    soft_rows: [N, E] unit features of the same rows from a momentum model; their softmax over the columns, without a
        gradient, is mixed into the target with weight `alpha` (ALBEF, NeurIPS 2021, section 3.3; BLIP).
    """
    logits = scaled_logits(rows, columns, logit_scale)
    positive = row_group[:, None] == column_group[None, :]
    count = positive.sum(1)
    matched = torch.where(positive, logits, 0.0).sum(1) / count.clamp_min(1)
    if soft_rows is not None:
        soft = scaled_logits(soft_rows.detach(), columns.detach(), torch.as_tensor(logit_scale).detach()).softmax(1)
        matched = alpha * (soft * logits).sum(1) + (1 - alpha) * matched
    return torch.where(count > 0, logits.logsumexp(1) - matched, 0.0)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    image_group: Tensor,
    text_group: Tensor,
) -> Tensor:
    """Symmetric InfoNCE: the mean of the image-to-text rows plus the mean of the text-to-image rows, halved.

    image_features [B, E], text_features [T, E] unit rows; groups [B], [T] int64: equal groups are positives. With the
    diagonal as the only positives it is CLIP's loss.
    """
    i2t = contrastive_rows(image_features, text_features, logit_scale, row_group=image_group, column_group=text_group)
    t2i = contrastive_rows(text_features, image_features, logit_scale, row_group=text_group, column_group=image_group)
    return (i2t.mean() + t2i.mean()) / 2
