"""InfoNCE with any number of positives on both sides, soft targets and a queue; the matrix of logits never exists.

Two operators walk the logits `S = logit_scale * rows @ columns.T` tile by tile (fastmat/ops/contrastive_tiles.py). The
first finds log-sum-exps and sums of positive logits, of rows and columns at once; the second, its backward, computes
each tile again, turns it into the gradient of those vectors and multiplies it with the features. These are 4 matrix
products where CLIP's two matrices of logits take 6, and memory above inputs and outputs is O(N + M) and one tile.
Everything else (losses, queue, mixing of targets) is arithmetic on vectors of length N and M, left to autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmat.errors import UserError
from fastmat.ops.arguments import FLOATS, check_device, check_dtype, check_ids, check_number, check_shape
from fastmat.ops.backend import Backend
from fastmat.ops.contrastive_operators import SoftMean, fold, positive_count


class ContrastiveStatistics(NamedTuple):
    """What every contrastive loss is made of: log-sum-exps and sums of the positive logits, of rows and of columns."""

    row_lse: Tensor
    row_match: Tensor
    column_lse: Tensor
    column_match: Tensor


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    image_group: Tensor | None = None,
    text_group: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Symmetric InfoNCE, []: the mean over images plus the mean over texts of their cross-entropies, halved.

    image_features [B, D], text_features [T, D] unit rows; image_group [B], text_group [T] int64: equal groups are
        positives (1:N, N:1, N:M) and share the target. Without groups image i matches text i (CLIP, ICML 2021, fig. 3).
    logit_scale: [] or a number, the multiplier, already exponentiated.
    fp32, fp16 or bf16 features: products are summed in fp32, also inside autocast, and fp32 comes out; fp64 runs the
    reference. fp32 products follow `torch.set_float32_matmul_precision`. Differentiable once, in features and scale.
    Bytes: the features of one side are read once per tile of the other; tiles stay in cache.
    Raises ValueError for wrong shapes, dtypes and devices; on the CPU also for an image or text without a positive. On
    a GPU, where looking would wait, such a row adds 0.
    """
    image_group, text_group = _checked_pair(
        ("image_features", image_features), ("text_features", text_features), logit_scale,
        ("image_group", image_group), ("text_group", text_group),
    )  # fmt: skip
    if not len(image_features):
        raise UserError("image_features must have at least one row")
    image_count = positive_count(image_group, text_group, "image_group", "text_group")
    text_count = positive_count(text_group, image_group, "text_group", "image_group")
    scale = _as_scale(logit_scale, image_features)
    found = _statistics(image_features, text_features, scale, image_group, text_group, False, True, backend)
    images = torch.where(image_count > 0, found.row_lse - found.row_match / image_count.clamp_min(1), 0.0)
    texts = torch.where(text_count > 0, found.column_lse - found.column_match / text_count.clamp_min(1), 0.0)
    return (images.mean() + texts.mean()) / 2


def contrastive_rows(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor | float,
    *,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
    soft_rows: Tensor | None = None,
    soft_weight: float = 0.0,
    queue: Tensor | None = None,
    queue_group: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """[N] cross-entropies of each row over all columns; the target is uniform over the row's positives.

    rows [N, D], columns [M, D] unit features; row_group [N], column_group [M] int64, equal where positive; without
        groups row i matches column i. Dtypes, bytes and errors as `contrastive_loss`.
    soft_rows: [N, D] features of the same rows from a momentum model; their softmax over the columns, a constant, is
        mixed into the target with weight `soft_weight` in [0, 1] (ALBEF, NeurIPS 2021, section 3.3; BLIP, ICML 2022).
    queue: [Q, D] more columns, never copied: hand a [D, Q] buffer in as its transposed view. queue_group: [Q] int64; an
        id that no row has, such as -1, makes a pure negative (without groups the rows are 0 to N - 1).
    """
    row_group, column_group = _checked_pair(
        ("rows", rows), ("columns", columns), logit_scale, ("row_group", row_group), ("column_group", column_group)
    )
    keys, key_groups = [columns], [column_group]
    if queue is not None and queue_group is not None:
        _, queue_group = _checked_pair(
            ("rows", rows), ("queue", queue), logit_scale, ("row_group", row_group), ("queue_group", queue_group)
        )
        keys, key_groups = [columns, queue], [column_group, queue_group]
    elif queue is not None or queue_group is not None:
        raise UserError("queue and queue_group must be given together")
    check_number("soft_weight", soft_weight)
    if not 0 <= soft_weight <= 1:
        raise UserError(f"soft_weight must be in [0, 1], got {soft_weight}")
    if soft_rows is not None:
        check_dtype("soft_rows", soft_rows, (*FLOATS, torch.float64))
        check_shape("soft_rows", soft_rows, rows.shape, "of rows")
        check_device(rows.device, soft_rows=soft_rows)
    elif soft_weight:
        raise UserError("soft_weight needs soft_rows, a momentum model's features of the rows")

    count = positive_count(row_group, torch.cat(key_groups), "row_group", "column_group")
    scale = _as_scale(logit_scale, rows)
    hard = [
        _statistics(rows, key, scale, row_group, group, False, False, backend)
        for key, group in zip(keys, key_groups, strict=True)
    ]
    lse, matched = hard[0].row_lse, hard[0].row_match
    for part in hard[1:]:
        lse, matched = torch.logaddexp(lse, part.row_lse), matched + part.row_match
    matched = matched / count.clamp_min(1)
    if soft_rows is not None and soft_weight:
        soft = [SoftMean.apply(*_alike(soft_rows.detach(), key, scale.detach()), backend or "") for key in keys]
        share = torch.stack([part_lse for _, part_lse in soft]).softmax(0).unsqueeze(2)
        mean = sum(weight * part for weight, (part, _) in zip(share, soft, strict=True))
        matched = soft_weight * scale * (rows * mean).sum(1) + (1 - soft_weight) * matched
    return torch.where(count > 0, lse - matched, 0.0)


def contrastive_statistics(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor | float,
    row_group: Tensor,
    column_group: Tensor,
    *,
    negatives_only: bool = False,
    column_side: bool = True,
    backend: Backend | None = None,
) -> ContrastiveStatistics:
    """Log-sum-exps of the logits and sums of the positive ones over rows [N] and columns [M], in one pass.

    rows [N, D], columns [M, D]; row_group [N], column_group [M] int64, equal where positive; every result is
    differentiable in rows, columns and scale. Dtypes, bytes and errors as `contrastive_loss`.
    negatives_only: the log-sum-exps leave positives out; -inf where nothing is left.
    column_side: False leaves the two column results empty, and saves their exponentials.
    """
    row_group, column_group = _checked_pair(
        ("rows", rows), ("columns", columns), logit_scale, ("row_group", row_group), ("column_group", column_group)
    )
    scale = _as_scale(logit_scale, rows)
    return _statistics(rows, columns, scale, row_group, column_group, negatives_only, column_side, backend)


def _checked_pair(
    rows: tuple[str, Tensor],
    columns: tuple[str, Tensor],
    logit_scale: Tensor | float,
    row_group: tuple[str, Tensor | None],
    column_group: tuple[str, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """The contiguous groups of a valid pair of named features; without groups, row i and column i are one group."""
    for name, features in (rows, columns):
        check_dtype(name, features, (*FLOATS, torch.float64))
        if features.dim() != 2:
            raise UserError(f"{name} must be [N, D], got {tuple(features.shape)}")
    (row_name, row_features), (column_name, column_features) = rows, columns
    check_shape(column_name, column_features, (len(column_features), row_features.shape[1]), f"as wide as {row_name}")
    check_device(row_features.device, **{column_name: column_features})
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1 or not logit_scale.is_floating_point():
            raise UserError(f"logit_scale must be one real number, got {logit_scale.dtype} {tuple(logit_scale.shape)}")
        check_device(row_features.device, logit_scale=logit_scale)
    else:
        check_number("logit_scale", logit_scale)
    if len(row_features) and not len(column_features):
        raise UserError(f"{column_name} must have at least one row")
    if row_group[1] is None and column_group[1] is None:
        if len(row_features) != len(column_features):
            raise UserError(
                f"without {row_group[0]} and {column_group[0]} row i matches column i, but {row_name} has "
                f"{len(row_features)} rows and {column_name} {len(column_features)}"
            )
        diagonal = torch.arange(len(row_features), device=row_features.device)
        return diagonal, diagonal
    found = []
    for (name, group), (owner, features), other in (
        (row_group, rows, column_group),
        (column_group, columns, row_group),
    ):
        if group is None:
            raise UserError(f"{name} must be given with {other[0]}")
        check_ids(name, group, len(features), f"one id per row of {owner}")
        check_device(row_features.device, **{name: group})
        found.append(group.contiguous())
    return found[0], found[1]


def _as_scale(logit_scale: Tensor | float, rows: Tensor) -> Tensor:
    """[] in at least fp32, on the device; a number gets there without waiting for a GPU."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if isinstance(logit_scale, Tensor):
        return logit_scale.to(dtype).reshape(())
    return torch.full((), logit_scale, dtype=dtype, device=rows.device)


def _alike(rows: Tensor, columns: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features in the wider of their dtypes, the scale in the dtype of their logits."""
    dtype = torch.promote_types(rows.dtype, columns.dtype)
    return rows.to(dtype), columns.to(dtype), scale.to(torch.promote_types(dtype, torch.float32))


def _statistics(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    row_group: Tensor,
    column_group: Tensor,
    negatives_only: bool,
    column_side: bool,
    backend: Backend | None,
) -> ContrastiveStatistics:
    features = _alike(rows, columns, scale)
    return ContrastiveStatistics(*fold(*features, row_group, column_group, negatives_only, column_side, backend or ""))
