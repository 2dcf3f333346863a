"""The walk over the tiles of a matrix of logits that never exists: a matrix product fills a tile, an epilogue uses it.

The epilogues are kernels/contrastive.py (whose docstring has the mathematics) or, in plain PyTorch, the `*_reference`
functions below. Both see raw products, in fp32 (fp64 for fp64) whatever the features are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import count, repeat
from typing import Any

import torch
from torch import Tensor

from fastmat.ops.backend import uses_triton

# Height and width of a square problem's tiles. GPU: 16 MiB of fp32 logits stay in L2, and 128 x 256 blocks of them are
# one wave on 132 processors; CPU: 1 MiB stays in a core's L2.
TILE = {"cuda": (2048, 2048), "cpu": (512, 512)}


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
    if not len(rows):
        return row_state, column_state
    height, width = _tile_shape(len(rows), len(columns), rows.device)
    buffer = scale.new_empty(height * width)
    # Views are made before the loop: on a GPU a tile takes tens of microseconds, and the host must keep ahead.
    down = zip(_split(rows, height), _split(row_group, height), _split(row_state, height, 1), strict=True)
    states = _split(column_state if column_side else None, width, 1)
    across = list(zip(_split(columns, width), _split(column_group, width), states, strict=False))
    for own, own_group, own_state in down:
        left = _operand(own)
        for other, other_group, other_state in across:
            tile = _products(left, _operand(other), buffer)
            fold(tile, scale, own_state, other_state, own_group, other_group, negatives_only)
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
    peak = peak_of(row_state[1:] if column_state is None else torch.cat([row_state[1:], column_state[1:]], 1))
    row_state = _relative(row_state, peak)
    column_state = None if column_state is None else _relative(column_state, peak)
    factor = factor * peak
    height, width = _tile_shape(n, m, rows.device)
    low = None if _operand(rows[:0]).dtype == scale.dtype else rows.new_empty(height * width)
    sums = None if row_sums.dtype == scale.dtype else scale.new_empty(height, d)
    down = zip(
        _split(rows, height),
        _split(row_group, height),
        _split(row_state, height, 1),
        _split(row_values, height),
        _split(None if column_values is None else row_sums, height),
        _buffers(row_sums, scale, height, width),
        strict=False,
    )

    @cache
    def across(width: int) -> list[tuple[Any, ...]]:
        return list(
            zip(
                _split(columns, width),
                _split(column_group, width),
                _split(column_state, width, 1),
                _split(column_values, width),
                _split(None if row_values is None else column_sums, width),
                strict=False,
            )
        )

    for own, own_group, own_state, own_values, own_sums, buffer in down:
        left = _operand(own)
        values = None if own_values is None else _operand(own_values)
        total = own_sums if sums is None else sums[: len(own)]
        blocks = across(_width(len(buffer) // height, m))
        for j, (other, other_group, other_state, other_values, other_sums) in enumerate(blocks):
            tile = _products(left, _operand(other), buffer)
            weights = tile if low is None else low.as_strided(tile.shape, tile.stride())
            weigh(tile, weights, scale, own_state, other_state, own_group, other_group, negatives_only)
            if values is not None:
                _multiply_add(other_sums, weights.T, values)
            if other_values is not None:
                _multiply_add(total, weights, _operand(other_values), keep=j > 0)
        if own_sums is not None:
            # Unlike (total * own).sum() it needs no memory, unless own is half precision.
            dot += torch.dot(total.flatten(), own.to(total.dtype).flatten())
            torch.mul(total, factor, out=own_sums)
    del down, buffer, low, sums, tile, weights, total  # a half-precision copy of column_sums may take their place
    return row_sums, column_sums.mul_(factor).to(dtype), dot * peak


def peak_of(values: Tensor) -> Tensor:
    """[] the largest finite magnitude, 1 where all are 0: relative to it, halves neither overflow nor underflow."""
    if not values.numel():
        return values.new_ones(())
    peak = values.abs().nan_to_num(nan=0.0, posinf=0.0).amax()
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


def _tile_shape(n: int, m: int, device: torch.device) -> tuple[int, int]:
    """Height and width of the tiles of [n, m] logits: one area, whatever the shape of the problem."""
    height, width = TILE.get(device.type, TILE["cpu"])
    area = height * width
    height = max(1, min(n, max(height, area // max(1, m))))
    return height, _width(area // height, m)


def _width(most: int, m: int) -> int:
    """Of tiles of m columns where `most` fit: multiples of 64 keep half precision aligned."""
    return m if most >= m else most - most % 64 or most


def _buffers(row_sums: Tensor, scale: Tensor, height: int, width: int) -> Iterator[Tensor]:
    """Flat memory for the tiles of each block of rows: height * width elements, or fewer.

    Where the gradients are only a few tiles large, a tile goes where `row_sums` is not written yet, below its block.
    The last blocks have too little below them: they share an eighth of `row_sums`, for narrower tiles.
    """
    area = height * width
    if row_sums.dtype != scale.dtype or height >= len(row_sums) or not area < row_sums.numel() < 8 * area:
        yield from repeat(scale.new_empty(area))
    # At least a quarter of a tile: each tile is four launches.
    shared = scale.new_empty(max(height * -(-width // 4), row_sums.numel() // 8))
    for start in count(height, height):
        below = row_sums[start:].flatten()[:area]
        yield below if len(below) > len(shared) else shared


def _split(side: Tensor | None, size: int, dim: int = 0) -> Iterable[Any]:
    """The blocks of a side, or None for each."""
    if side is None:
        return repeat(None)
    return (side,) if side.shape[dim] <= size else side.split(size, dim)


def _operand(features: Tensor) -> Tensor:
    """A block as it enters a product: tensor cores sum products of halves in fp32, a CPU must be given fp32."""
    return features if features.dtype.itemsize > 2 or features.is_cuda else features.float()


def _products(rows: Tensor, columns: Tensor, buffer: Tensor) -> Tensor:
    """rows @ columns.T, contiguous, at the beginning of `buffer`."""
    tile = buffer.as_strided((len(rows), len(columns)), (len(columns), 1))
    _multiply_add(tile, rows, columns.T, keep=False)
    return tile


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
