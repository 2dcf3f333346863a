import pytest
import torch

from fastmat.ops import retrieval_ranks
from fastmat.ops.ranks import ranks_of_scores


def brute_force(scores, query_group, gallery_group) -> list[int]:
    ranks = []
    for row, group in zip(scores.tolist(), query_group.tolist(), strict=True):
        own = [s for s, g in zip(row, gallery_group.tolist(), strict=True) if g == group]
        others = [s for s, g in zip(row, gallery_group.tolist(), strict=True) if g != group]
        ranks.append(sum(s > max(own) for s in others) + sum(s == max(own) for s in others) // 2 if own else len(row))
    return ranks


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_against_brute_force_with_ragged_positives_and_ties(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-1, 2, (11, 3), generator=generator).float()
    gallery = torch.randint(-1, 2, (17, 3), generator=generator).float()
    query_group, gallery_group = torch.arange(11) % 6, torch.arange(17) % 5
    got = retrieval_ranks(queries, gallery, query_group=query_group, gallery_group=gallery_group, chunk=chunk)
    assert got.tolist() == brute_force(queries @ gallery.T, query_group, gallery_group)


def test_a_single_tie_counts_for_the_positive() -> None:
    scores = torch.tensor([[1.0, 1.0, 2.0]])
    group = torch.tensor([0, 1, 2])
    assert ranks_of_scores(scores, query_group=group[:1], gallery_group=group).tolist() == [1]


def test_a_model_without_any_opinion_ranks_in_the_middle() -> None:
    same, group = torch.ones(21, 4), torch.arange(21)
    assert retrieval_ranks(same, same, query_group=group, gallery_group=group).tolist() == [10] * 21
