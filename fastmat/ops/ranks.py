"""Retrieval ranks without the whole score matrix.

rank = #(non-positives better than the best positive) + #(non-positives that tie with it) // 2, so that a model that
gives everything the same features ranks in the middle, not first. A NaN never improves a rank: a non-positive counts as
better unless its score is at most the best positive's, and a NaN among the positives gives the worst rank.

The columns are sorted by group once, which makes the positives of a query a run of that order: a row of scores is then
counted against its best positive, and nothing of size Q x G exists, neither scores nor which of them are positives.
No operator here has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmat.errors import UserError
from fastmat.ops.arguments import FLOATS, check_device, check_dtype, check_ids
from fastmat.ops.backend import Backend, uses_triton
from fastmat.ops.scores import check_features, score_tiles

DTYPES = (*FLOATS, torch.float64)
# Scores the reference counts at a time: 1 MiB of comparisons stays in a core's cache, and fp32 sums of ones are exact.
BLOCK = 2**18


def ranks_reference(scores: Tensor, order: Tensor, first: Tensor, count: Tensor, ranks: Tensor) -> None:
    """Write the ranks [Q] of scores [Q, G] whose row i has the positives order[first[i] : first[i] + count[i]].

    Positives are gathered for a block of rows, so that even a row whose every column is positive needs O(G) more.
    """
    total = scores.shape[1]
    ones = scores.new_empty(0, dtype=torch.promote_types(scores.dtype, torch.float32))
    rows = max(1, BLOCK // max(1, total))
    for top in range(0, len(scores), rows):
        here = slice(top, top + rows)
        block, own_count = scores[here].to(ones.dtype), count[here, None]
        slot = torch.arange(int(own_count.max()), device=scores.device)
        # Shorter lists of positives repeat their last one.
        own = block.gather(1, order[first[here, None] + slot.minimum(own_count - 1)])
        best = own.amax(1, keepdim=True)
        better = torch.full_like(ranks[here], total)
        tied = -((own == best) & (slot < own_count)).sum(1)
        for piece in block.split(BLOCK, dim=1):
            # Ones as floats: comparing and summing takes a third of what it takes with booleans.
            ones.resize_(piece.shape)
            better -= torch.le(piece, best, out=ones).sum(1).long()
            tied += torch.eq(piece, best, out=ones).sum(1).long()
        ranks[here] = torch.where(best[:, 0].isnan(), total - count[here], better + tied // 2)


def retrieval_ranks(
    queries: Tensor, gallery: Tensor, *, query_group: Tensor, gallery_group: Tensor, backend: Backend | None = None
) -> Tensor:
    """[Q] int64: for each query the rank (0 is best) of its best positive by dot product; the rule is the module's.

    queries [Q, D], gallery [G, D] of one dtype, fp32, bf16, fp16 or fp64; scores are fp32 (fp64), also in autocast, and
    fp32 products follow torch.set_float32_matmul_precision. query_group [Q], gallery_group [G] int64: equal groups are
    positives, any number per query.
    Memory: O(Q + G) and one tile of scores (`fastmat.ops.scores.TILE_BYTES`, or one row where that is more), on the CPU
    also the features widened to fp32; every score is written once and read once.
    Raises ValueError naming the argument, also for a query without a positive (a look at values: CUDA waits for it).

    >>> unit, group = torch.eye(3), torch.arange(3)
    >>> retrieval_ranks(unit, unit.flip(0), query_group=group, gallery_group=group).tolist()
    [1, 0, 1]
    """
    check_features(queries, gallery, DTYPES)
    _check_groups(query_group, gallery_group, len(queries), len(gallery), queries.device)
    return _retrieval_ranks(queries, gallery, query_group, gallery_group, backend or "")


def ranks_of_scores(
    scores: Tensor, *, query_group: Tensor, gallery_group: Tensor, backend: Backend | None = None
) -> Tensor:
    """[Q] int64 ranks of the best positive in a given [Q, G] score matrix: groups and errors as in `retrieval_ranks`.

    scores: fp32, bf16, fp16 or fp64, any strides; read once, never copied whole.

    >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    >>> ranks_of_scores(scores, query_group=torch.tensor([0, 1]), gallery_group=torch.tensor([0, 1])).tolist()
    [0, 1]
    """
    check_dtype("scores", scores, DTYPES)
    if scores.dim() != 2:
        raise UserError(f"scores must have shape (queries, gallery), got {tuple(scores.shape)}")
    _check_groups(query_group, gallery_group, scores.shape[0], scores.shape[1], scores.device)
    return _ranks_of_scores(scores, query_group, gallery_group, backend or "")


@torch.library.custom_op("fastmat::retrieval_ranks", mutates_args=())
def _retrieval_ranks(
    queries: Tensor, gallery: Tensor, query_group: Tensor, gallery_group: Tensor, backend: str
) -> Tensor:
    order, first, count = _positives(query_group, gallery_group)
    ranks = query_group.new_empty(query_group.shape)
    for rows, _, tile in score_tiles(queries, gallery, columns=len(gallery)):
        _write_ranks(tile, order, first[rows], count[rows], ranks[rows], backend)
    return ranks


@torch.library.custom_op("fastmat::ranks_of_scores", mutates_args=())
def _ranks_of_scores(scores: Tensor, query_group: Tensor, gallery_group: Tensor, backend: str) -> Tensor:
    ranks = query_group.new_empty(query_group.shape)
    _write_ranks(scores, *_positives(query_group, gallery_group), ranks, backend)
    return ranks


@_retrieval_ranks.register_fake
def _(queries: Tensor, gallery: Tensor, query_group: Tensor, gallery_group: Tensor, backend: str) -> Tensor:
    return query_group.new_empty(query_group.shape)


@_ranks_of_scores.register_fake
def _(scores: Tensor, query_group: Tensor, gallery_group: Tensor, backend: str) -> Tensor:
    return query_group.new_empty(query_group.shape)


def _check_groups(query_group: Tensor, gallery_group: Tensor, queries: int, gallery: int, device: torch.device) -> None:
    check_ids("query_group", query_group, queries, "one per query")
    check_ids("gallery_group", gallery_group, gallery, "one per gallery row")
    check_device(device, query_group=query_group, gallery_group=gallery_group)
    if queries and not gallery:
        raise UserError("gallery_group is empty: there is nothing to rank")


def _positives(query_group: Tensor, gallery_group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns in order of their group [G]; where the positives of each query begin there, and how many [Q]."""
    groups, order = gallery_group.sort()
    query_group = query_group.contiguous()
    first = torch.searchsorted(groups, query_group)
    count = torch.searchsorted(groups, query_group, right=True) - first
    if not count.all():
        query = int((count == 0).nonzero()[0])
        raise UserError(
            f"query_group[{query}] is {int(query_group[query])}, which is nowhere in gallery_group: "
            f"every query needs a positive"
        )
    return order, first, count


def _write_ranks(scores: Tensor, order: Tensor, first: Tensor, count: Tensor, ranks: Tensor, backend: str) -> None:
    if uses_triton(backend or None, scores.device):
        from fastmat.kernels.ranks import launch_ranks

        launch_ranks(scores, order, first, count, ranks)
    else:
        ranks_reference(scores, order, first, count, ranks)
