"""The walk over the tiles of a matrix of logits that never exists: a matrix product fills a tile, an epilogue uses it.

The epilogues are kernels/contrastive.py (whose docstring has the mathematics) or, in plain PyTorch, the `*_reference`
functions below. Both see raw products, in fp32 (fp64 for fp64) whatever the features are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastmat.ops.backend import uses_triton

# Height and width of a square problem's tiles. GPU: 20 MiB of fp32 logits stay in L2; CPU: 1 MiB stays in a core's.
TILE = {"cuda": (2048, 2560), "cpu": (512, 512)}


def fold_tiles(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    row_group: Tensor,
    column_group: Tensor,
    negatives_only: bool,
    column_side: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """[3, N] and [3, M] (or [3, 0]): maxima of the logits, sums of exponentials relative to them, sums of positives."""
    fold, _ = _epilogues(backend, rows)
    row_state, column_state = (
        scale.new_zeros(3, len(side)) for side in (rows, columns if column_side else columns[:0])
    )
    row_state[0], column_state[0] = -torch.inf, -torch.inf
    for block, span, tile in _tiles(rows, columns, scale.dtype):
        fold(
            tile,
            scale,
            row_state[:, block],
            column_state[:, span] if column_side else None,
            row_group[block],
            column_group[span],
            negatives_only,
        )
    return row_state, column_state


def weigh_tiles(
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
    """factor W @ column_values [N, D], factor W.T @ row_values [M, D] and the sum of rows * (W @ column_values).

    W [N, M] are the weights of `weigh`, the gradient of S that row_state [3, N] and column_state [3, M] describe:
    log-sum-exps, their gradients, gradients of the sums of positives. column_state None: of rows only. Values None: the
    product with them is [0, D]. Features and values may be half precision; dtype is that of both products.
    """
    _, weigh = _epilogues(backend, rows)
    (n, d), m = rows.shape, len(columns)
    row_sums = rows.new_empty(0 if column_values is None else n, d, dtype=dtype)
    column_sums = scale.new_zeros(0 if row_values is None else m, d)
    dot = torch.zeros_like(scale)
    if not n:
        return row_sums, column_sums.to(dtype), dot
    given = [row_state] if column_state is None else [row_state, column_state]
    peak = peak_of(torch.cat([state[1:].flatten() for state in given]))
    row_state = _relative(row_state, peak)
    column_state = None if column_state is None else _relative(column_state, peak)
    factor = factor * peak
    height, width = _tile_shape(n, m, rows.device)
    low = scale.new_empty(height * width, dtype=rows.dtype) if _takes_halves(rows) else None
    sums = scale.new_empty(height, d)
    for block, span, tile in _tiles(rows, columns, scale.dtype):
        weights = tile if low is None else low[: tile.numel()].view(tile.shape)
        weigh(
            tile,
            weights,
            scale,
            row_state[:, block],
            column_state[:, span] if column_state is not None else None,
            row_group[block],
            column_group[span],
            negatives_only,
        )
        if row_values is not None:
            _multiply_add(column_sums[span], weights.T, _operand(row_values[block]))
        if column_values is not None:
            total = sums[: len(tile)]
            _multiply_add(total, weights, _operand(column_values[span]), keep=span.start > 0)
            if span.stop >= m:
                dot += (total * rows[block]).sum()
                torch.mul(total, factor, out=row_sums[block])
    return row_sums, column_sums.mul_(factor).to(dtype), dot * peak


def peak_of(values: Tensor) -> Tensor:
    """[] the largest magnitude, 1 where all are 0: relative to it, half precision neither overflows nor underflows."""
    peak = values.abs().amax()
    return peak.masked_fill(peak == 0, 1.0)


def _relative(state: Tensor, peak: Tensor) -> Tensor:
    """A state with its gradients over `peak`, and finite log-sum-exps: without negatives every exp(-inf - lse) is 0."""
    lse, *grads = state
    return torch.stack([lse.masked_fill(lse == -torch.inf, 0.0), *(grad / peak for grad in grads)])


def _epilogues(backend: str, rows: Tensor) -> tuple[Callable[..., None], Callable[..., None]]:
    if uses_triton(backend or None, rows.device) and rows.dtype != torch.float64:
        from fastmat.kernels.contrastive import launch_fold, launch_weigh

        return launch_fold, launch_weigh
    return fold_reference, weigh_reference


def _tiles(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """Row slice, column slice and raw products of one tile after the other, row by row, all in one buffer."""
    n, m = len(rows), len(columns)
    height, width = _tile_shape(n, m, rows.device)
    buffer = rows.new_empty(height * width, dtype=dtype)
    for i in range(0, n, height):
        own = _operand(rows[i : i + height])
        for j in range(0, m, width):
            other = _operand(columns[j : j + width])
            tile = buffer[: len(own) * len(other)].view(len(own), len(other))
            _multiply_add(tile, own, other.T, keep=False)
            yield slice(i, i + height), slice(j, j + width), tile


def _tile_shape(n: int, m: int, device: torch.device) -> tuple[int, int]:
    """Height and width of the tiles of [n, m] logits: one area, whatever the shape of the problem."""
    height, width = TILE.get(device.type, TILE["cpu"])
    area = height * width
    height = max(1, min(n, max(height, area // max(1, m))))
    width = min(m, area // height)
    return height, max(1, width - width % 64 or width)  # a multiple of 64 keeps half precision aligned


def _takes_halves(features: Tensor) -> bool:
    """Tensor cores sum products of halves in fp32 by themselves; a CPU must be given fp32."""
    return features.device.type == "cuda" and features.dtype.itemsize == 2


def _operand(features: Tensor) -> Tensor:
    """A block as it enters a product."""
    return features if _takes_halves(features) else features.to(torch.promote_types(features.dtype, torch.float32))


def _multiply_add(out: Tensor, left: Tensor, right: Tensor, *, keep: bool = True) -> None:
    """out + left @ right into out, without `keep` left @ right alone; summed in its dtype, also inside autocast."""
    if left.dtype == out.dtype:
        out.addmm_(left, right, beta=int(keep))
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=int(keep), out=out)


def fold_reference(
    tile: Tensor,
    scale: Tensor,
    row_state: Tensor,
    column_state: Tensor | None,
    row_group: Tensor,
    column_group: Tensor,
    negatives_only: bool,
) -> None:
    """Fold a tile of raw products [n, m] into row_state [3, n] and column_state [3, m]; the tile is used up."""
    tile.mul_(scale)
    positive = row_group[:, None] == column_group
    matched = torch.where(positive, tile, 0.0)
    if negatives_only:
        tile.masked_fill_(positive, -torch.inf)
    for state, over in ((row_state, 1), (column_state, 0)):
        if state is None:
            continue
        top = torch.maximum(state[0], tile.amax(over))
        # While nothing but -inf was seen, exp(-inf - -inf) would be NaN.
        shift = top.masked_fill(top == -torch.inf, 0.0)
        state[1] = state[1] * (state[0] - shift).exp() + (tile - shift.unsqueeze(over)).exp_().sum(over)
        state[0] = top
        state[2] += matched.sum(over)


def weigh_reference(
    tile: Tensor,
    out: Tensor,
    scale: Tensor,
    row_state: Tensor,
    column_state: Tensor | None,
    row_group: Tensor,
    column_group: Tensor,
    negatives_only: bool,
) -> None:
    """Write the gradient of a tile of raw products with respect to its logits into `out`; the tile is used up."""
    tile.mul_(scale)
    positive = row_group[:, None] == column_group
    if negatives_only:
        tile.masked_fill_(positive, -torch.inf)
    lse, grad, match = row_state.unsqueeze(2)
    weights = (tile - lse).exp_().mul_(grad)
    if column_state is not None:
        weights += tile.sub_(column_state[0]).exp_().mul_(column_state[1])
        match = match + column_state[2]
    weights += torch.where(positive, match, 0.0)
    out.copy_(weights)
