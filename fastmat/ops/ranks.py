"""Retrieval ranks without the whole score matrix."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def retrieval_ranks(
    queries: Tensor, gallery: Tensor, *, query_group: Tensor, gallery_group: Tensor, chunk: int = 4096
) -> Tensor:
    """[Q] int64: for each query the rank (0 is best) of its best positive by dot product.

    queries [Q, E], gallery [G, E]; positives have equal groups. A query without a positive gets rank G. Ties: half of
    the non-positives with the very score of the best positive stand before it, rounded down, so that a model that gives
    everything the same features ranks in the middle, not first. Memory is O(chunk x G).
    """
    ranks = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), chunk):
        stop = min(start + chunk, len(queries))
        ranks[start:stop] = ranks_of_scores(
            queries[start:stop] @ gallery.T, query_group=query_group[start:stop], gallery_group=gallery_group
        )
    return ranks


def ranks_of_scores(scores: Tensor, *, query_group: Tensor, gallery_group: Tensor) -> Tensor:
    """[Q] ranks of the best positive in a given [Q, G] score matrix; ties as in `retrieval_ranks`.

    >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    >>> ranks_of_scores(scores, query_group=torch.tensor([0, 1]), gallery_group=torch.tensor([0, 1])).tolist()
    [0, 1]
    """
    positive = query_group[:, None] == gallery_group[None, :]
    best = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    better = (scores > best).sum(1)
    tied = ((scores == best) & ~positive).sum(1)
    return torch.where(positive.any(1), better + tied // 2, scores.shape[1])
