"""The `torch.library` operators behind the contrastive losses: statistics of logits, their gradient, counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmat.errors import UserError
from fastmat.ops.contrastive_tiles import fold_tiles, peak_of, weigh_tiles


class SoftMean(torch.autograd.Function):
    """[N, D] means of the columns under softmax(scale * rows @ columns.T), and [N] log-sum-exps.

    The softmax is a constant; columns get a gradient as what is averaged.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        # No row and column share a group here.
        groups = [rows.new_full((len(side),), i, dtype=torch.int64) for i, side in enumerate((rows, columns))]
        lse, *_ = fold(rows, columns, scale, *groups, False, False, backend)
        # The mean is the gradient of the log-sum-exp over the scale.
        state = torch.stack([lse, torch.ones_like(lse), torch.zeros_like(lse)])
        one = torch.ones_like(scale)
        mean, _, _ = weigh(rows, columns, scale, state, None, *groups, False, None, columns, one, one.dtype, backend)
        ctx.save_for_backward(rows, columns, scale, state, *groups)
        ctx.backend = backend
        ctx.mark_non_differentiable(lse)
        return mean, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, state, *groups = ctx.saved_tensors
        peak = peak_of(grad)
        values = (grad / peak).to(rows.dtype)
        _, d_columns, _ = weigh(
            rows, columns, scale, state, None, *groups, False, values, None, peak, columns.dtype, ctx.backend
        )
        return None, d_columns, None, None


@torch.library.custom_op("fastmat::contrastive_positive_count", mutates_args=())
def positive_count(own: Tensor, other: Tensor, own_name: str, other_name: str) -> Tensor:
    """[N] int64: how many of `other` [M] equal each of `own` [N]; on the CPU none is an error."""
    ordered, order = own.sort()
    # Every other id adds one from the first own id that equals it on, and takes it back behind the last.
    edges = own.new_zeros(len(own) + 1)
    for right, sign in ((False, 1), (True, -1)):
        edges.scatter_add_(0, torch.searchsorted(ordered, other, right=right), torch.full_like(other, sign))
    count = torch.empty_like(own).scatter_(0, order, edges.cumsum(0)[:-1])
    if count.device.type == "cpu" and not bool(count.all()):
        i = int((count == 0).nonzero()[0])
        raise UserError(f"{own_name}: no entry of {other_name} equals entry {i} ({int(own[i])}), which has no positive")
    return count


@positive_count.register_fake
def _(own: Tensor, other: Tensor, own_name: str, other_name: str) -> Tensor:
    return torch.empty_like(own)


@torch.library.custom_op("fastmat::contrastive_fold", mutates_args=())
def fold(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    row_group: Tensor,
    column_group: Tensor,
    negatives_only: bool,
    column_side: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four vectors of ContrastiveStatistics."""
    row_state, column_state = fold_tiles(
        rows, columns, scale, row_group, column_group, negatives_only, column_side, backend
    )
    row_max, row_sum, row_match = row_state
    column_max, column_sum, column_match = column_state
    return row_max + row_sum.log(), row_match.clone(), column_max + column_sum.log(), column_match.clone()


@fold.register_fake
def _(
    rows: Tensor, columns: Tensor, scale: Tensor, _r: Tensor, _c: Tensor, _n: bool, column_side: bool, _b: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, m = len(rows), len(columns) if column_side else 0
    return scale.new_empty(n), scale.new_empty(n), scale.new_empty(m), scale.new_empty(m)


weigh = torch.library.custom_op("fastmat::contrastive_weigh", weigh_tiles, mutates_args=())


@weigh.register_fake
def _(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    row_state: Tensor,
    column_state: Tensor | None,
    row_group: Tensor,
    column_group: Tensor,
    negatives_only: bool,
    row_values: Tensor | None,
    column_values: Tensor | None,
    factor: Tensor,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    n, m = 0 if column_values is None else len(rows), 0 if row_values is None else len(columns)
    d = rows.shape[1]
    return rows.new_empty(n, d, dtype=dtype), rows.new_empty(m, d, dtype=dtype), torch.empty_like(scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.negatives_only, ctx.column_side, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[0], output[2])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    rows, columns, scale, row_group, column_group, row_lse, column_lse = ctx.saved_tensors
    for_rows, for_columns, for_scale = ctx.needs_input_grad[:3]
    row_state = torch.stack([row_lse, grads[0], grads[1]])
    column_state = torch.stack([column_lse, grads[2], grads[3]]) if ctx.column_side else None
    d_rows, d_columns, d_scale = weigh(
        rows,
        columns,
        scale,
        row_state,
        column_state,
        row_group,
        column_group,
        ctx.negatives_only,
        rows if for_columns else None,
        columns if for_rows or for_scale else None,
        scale,
        rows.dtype,
        ctx.backend,
    )
    found = (d_rows if for_rows else None, d_columns if for_columns else None, d_scale if for_scale else None)
    return *found, None, None, None, None, None


fold.register_autograd(_backward, setup_context=_save)
