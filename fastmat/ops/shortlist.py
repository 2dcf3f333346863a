"""The k best gallery rows of every query without the whole score matrix, in one order on every backend.

Larger scores first, equal scores (-0 and 0 too) by smaller index, NaN last. Score and index of a column are packed into
one int64 key with that order; keys of a row are distinct, so whatever top-k selects them finds the same ones.
Only k groups of GROUP neighbouring columns can hold the k best: those whose best column stands first. So a tile is read
once for the maximum of every group, and keys are made, and selected, for the columns of k groups alone.
The operator has no gradient.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from fastmat.errors import UserError
from fastmat.ops.arguments import FLOATS
from fastmat.ops.backend import Backend, uses_triton
from fastmat.ops.scores import check_features, score_tiles

GROUP = 32
# At most so many columns of the gallery in one tile.
COLUMNS = 2**18
# Scores the reference handles at a time: 1 MiB stays in a core's cache.
BLOCK = 2**18
LOWEST = torch.iinfo(torch.int64).min
INDICES = 2**31 - 1


def topk_shortlist(
    queries: Tensor, gallery: Tensor, k: int, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Scores [Q, k] fp32 and indices [Q, k] int64 of the k gallery rows with the largest dot products, best first.

    queries [Q, D], gallery [G, D] of one dtype, fp32, bf16 or fp16; scores are fp32, also in autocast, and fp32
    products follow torch.set_float32_matmul_precision. 1 <= k <= G < 2^31. The order is the module's.
    Memory: O(Q k) and a few tiles of scores (`fastmat.ops.scores.TILE_BYTES`), on the CPU also the features widened to
    fp32; every score is written once and read once, the columns of k groups a second time.
    Raises ValueError naming the argument.

    >>> scores, indices = topk_shortlist(torch.eye(2), torch.tensor([[0.5, 0.2], [0.7, 0.9], [0.7, 0.1]]), 2)
    >>> indices.tolist()
    [[1, 2], [1, 0]]
    """
    check_features(queries, gallery, FLOATS)
    if not (isinstance(k, Integral) and 1 <= k <= len(gallery)):
        raise UserError(f"k must be a whole number from 1 to the {len(gallery)} rows of the gallery, got {k!r}")
    if len(gallery) > INDICES:
        raise UserError(f"gallery must have fewer than 2^31 rows, got {len(gallery)}")
    return _topk_shortlist(queries.detach(), gallery.detach(), int(k), backend or "")


@torch.library.custom_op("fastmat::topk_shortlist", mutates_args=())
def _topk_shortlist(queries: Tensor, gallery: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    merge = _merge if uses_triton(backend or None, queries.device) else merge_reference
    scores = torch.empty(len(queries), k, dtype=torch.float32, device=queries.device)
    indices = torch.empty_like(scores, dtype=torch.int64)
    for rows, columns, tile in score_tiles(queries, gallery, COLUMNS):
        if columns.start == 0:
            keys = indices[rows].fill_(LOWEST)
        merge(keys, tile, columns.start)
        if columns.stop == len(gallery):
            scores[rows] = _scores_of(keys)
            keys.bitwise_and_(INDICES).neg_().add_(INDICES)
    return scores, indices


@_topk_shortlist.register_fake
def _(queries: Tensor, gallery: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    shape = len(queries), k
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def merge_reference(keys: Tensor, scores: Tensor, first_index: int) -> None:
    """Put the best of keys [Q, k] and of the keys of scores [Q, N] into `keys`, largest first."""
    rows = max(1, BLOCK // scores.shape[1])
    for held, some in zip(keys.split(rows), scores.split(rows), strict=True):
        _keep_best(held, _column_keys(some, _best_groups(some, held.shape[1]), first_index))


def _merge(keys: Tensor, scores: Tensor, first_index: int) -> None:
    """`merge_reference` with the kernels."""
    from fastmat.kernels.shortlist import launch_column_keys, launch_group_keys

    k, groups = keys.shape[1], -(-scores.shape[1] // GROUP)
    chosen = None
    if _is_worth_choosing(k, groups):
        group_keys = keys.new_empty(len(keys), groups)
        launch_group_keys(scores, group_keys)
        chosen = group_keys.topk(k, sorted=False).values
    column_keys = keys.new_empty(len(keys), (groups if chosen is None else k) * GROUP)
    launch_column_keys(scores, chosen, column_keys, first_index=first_index)
    _keep_best(keys, column_keys)


def _is_worth_choosing(k: int, groups: int) -> bool:
    return 2 * k <= groups


def _keep_best(keys: Tensor, others: Tensor) -> None:
    keys.copy_(torch.cat([keys, others], 1).topk(keys.shape[1]).values)


def _best_groups(scores: Tensor, k: int) -> Tensor | None:
    """[Q, k] the groups that hold the k best columns; None where looking for them is not worth while."""
    if not _is_worth_choosing(k, -(-scores.shape[1] // GROUP)):
        return None
    top = _group_maximum(scores)
    # A NaN hides the rest of its group: only then the maxima are taken of the images of all scores.
    images = _group_maximum(_images_of(scores)) if top.isnan().any() else _images_of(top)
    chosen = _pack(images, torch.arange(images.shape[1], device=scores.device)).topk(k, sorted=False).values
    return INDICES - (chosen & INDICES)


def _group_maximum(values: Tensor) -> Tensor:
    """[Q, ceil(N / GROUP)] maxima over neighbours of values [Q, N]; the last group may be smaller."""
    whole = values.shape[1] // GROUP * GROUP
    parts = [values[:, :whole].unflatten(1, (-1, GROUP)).amax(2)]
    if whole < values.shape[1]:
        parts.append(values[:, whole:].amax(1, keepdim=True))
    return torch.cat(parts, 1)


def _column_keys(scores: Tensor, groups: Tensor | None, first_index: int) -> Tensor:
    """Keys of the columns in `groups` [Q, C], or of all; a place beyond the last column holds LOWEST."""
    total = scores.shape[1]
    if groups is None:
        return _pack(_images_of(scores), torch.arange(first_index, first_index + total, device=scores.device))
    columns = (groups[..., None] * GROUP + torch.arange(GROUP, device=scores.device)).flatten(1)
    keys = _pack(_images_of(scores.gather(1, columns.clamp_max(total - 1))), columns + first_index)
    return keys.masked_fill_(columns >= total, LOWEST)


def _pack(images: Tensor, indices: Tensor) -> Tensor:
    return images.long().bitwise_left_shift_(32).bitwise_or_(INDICES - indices)


def _images_of(scores: Tensor) -> Tensor:
    """int32 in the order of the fp32 scores: equal for both zeros, for NaN -2^31, which no number has."""
    bits = (scores + 0.0).view(torch.int32)  # -0 + 0 is 0
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(INDICES)).masked_fill_(scores.isnan(), -(2**31))


def _scores_of(keys: Tensor) -> Tensor:
    """The fp32 scores in keys; the image of NaN has a NaN's bits."""
    images = (keys >> 32).int()
    return images.bitwise_xor_((images >> 31).bitwise_and_(INDICES)).view(torch.float32)
