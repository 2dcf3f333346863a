"""Ranks against a loop over Python numbers, by both backends; what they mean; what they refuse; what they allocate."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmat.errors import UserError
from fastmat.ops import ranks as module
from fastmat.ops import retrieval_ranks, scores
from fastmat.ops.ranks import ranks_of_scores

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def brute_force(table: Tensor, query_group: Tensor, gallery_group: Tensor) -> list[int]:
    ranks, columns = [], gallery_group.tolist()
    for row, group in zip(table.tolist(), query_group.tolist(), strict=True):
        own = [s for s, g in zip(row, columns, strict=True) if g == group]
        others = [s for s, g in zip(row, columns, strict=True) if g != group]
        best = math.nan if any(math.isnan(s) for s in own) else max(own)
        ranks.append(sum(not s <= best for s in others) + sum(s == best for s in others) // 2)
    return ranks


def groups(queries: int, gallery: int, kinds: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ragged groups with gaps between their numbers, duplicates on both sides; every query has a positive."""
    gallery_group = 7 * torch.randint(-kinds, kinds, (gallery,), generator=generator)
    return gallery_group[torch.randint(gallery, (queries,), generator=generator)], gallery_group


def whole_numbers(*shape: int, generator: torch.Generator) -> Tensor:
    """Few values, so that scores tie, and exact sums in any order."""
    return torch.randint(-2, 3, shape, generator=generator).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("q", "g", "kinds"), [(1, 1, 1), (7, 31, 3), (5, 32, 1), (3, 33, 20), (4, 2, 2)])
def test_against_brute_force(q: int, g: int, kinds: int, dtype: torch.dtype, backend, device) -> None:
    generator = torch.Generator().manual_seed(g)
    queries, gallery = whole_numbers(q, 3, generator=generator), whole_numbers(g, 3, generator=generator)
    query_group, gallery_group = groups(q, g, kinds, generator)
    table, want = queries @ gallery.T, brute_force(queries @ gallery.T, query_group, gallery_group)
    ids = {"query_group": query_group.to(device), "gallery_group": gallery_group.to(device), "backend": backend}
    got = retrieval_ranks(queries.to(device, dtype), gallery.to(device, dtype), **ids)
    assert got.dtype == torch.int64 and got.device == ids["query_group"].device and got.tolist() == want
    assert ranks_of_scores(table.to(device, dtype), **ids).tolist() == want


@pytest.mark.parametrize("seed", range(4))
def test_nan_and_infinity_never_improve_a_rank(seed: int, backend, device) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = whole_numbers(6, 23, generator=generator)
    for value in (math.nan, math.inf, -math.inf):
        table[torch.rand(table.shape, generator=generator) < 0.1] = value
    query_group, gallery_group = groups(6, 23, 4, generator)
    table[0], table[1], table[2] = math.nan, math.inf, -math.inf
    got = ranks_of_scores(
        table.to(device), query_group=query_group.to(device), gallery_group=gallery_group.to(device), backend=backend
    )
    assert got.tolist() == brute_force(table, query_group, gallery_group)
    assert got[0] == (gallery_group != query_group[0]).sum(), "nothing but NaN is the worst rank"


def test_ties_are_shared_evenly(backend) -> None:
    one_tie = torch.tensor([[1.0, 1.0, 2.0]])
    group = torch.tensor([0, 1, 2])
    assert ranks_of_scores(one_tie, query_group=group[:1], gallery_group=group, backend=backend).tolist() == [1]
    same, group = torch.ones(21, 4), torch.arange(21)
    assert retrieval_ranks(same, same, query_group=group, gallery_group=group, backend=backend).tolist() == [10] * 21


def test_zeros_of_both_signs_tie(backend) -> None:
    group = torch.arange(3)
    table = torch.tensor([[0.0, -0.0, -0.0]])
    assert ranks_of_scores(table, query_group=group[:1], gallery_group=group, backend=backend).tolist() == [1]


def test_any_strides(backend, device) -> None:
    generator = torch.Generator().manual_seed(0)
    query_group, gallery_group = (ids.to(device) for ids in groups(6, 20, 3, generator))
    ids = {"query_group": query_group, "gallery_group": gallery_group, "backend": backend}
    queries = whole_numbers(6, 4, generator=generator).to(device)
    gallery = whole_numbers(20, 4, generator=generator).to(device)
    want = retrieval_ranks(queries, gallery, **ids)
    spread = {name: torch.stack([v, -v], 1)[:, 0] if name != "backend" else v for name, v in ids.items()}
    assert torch.equal(retrieval_ranks(queries.T.contiguous().T, gallery.repeat(1, 2)[:, :4], **spread), want)
    table = queries @ gallery.T
    assert torch.equal(ranks_of_scores(table.T.contiguous().T, **spread), want)
    assert torch.equal(ranks_of_scores(torch.stack([table, -table], 2)[..., 0], **spread), want)


@pytest.mark.parametrize("budget", [1, 200, 333, 10**6])
def test_equal_in_any_tile(budget: int, backend, device, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(1)
    queries, gallery = whole_numbers(11, 3, generator=generator), whole_numbers(17, 3, generator=generator)
    query_group, gallery_group = groups(11, 17, 3, generator)
    monkeypatch.setattr(scores, "TILE_BYTES", {"cpu": budget, "cuda": budget})
    monkeypatch.setattr(module, "BLOCK", budget // 4 + 1)  # also pieces of a row
    got = retrieval_ranks(
        queries.to(device),
        gallery.to(device),
        query_group=query_group.to(device),
        gallery_group=gallery_group.to(device),
        backend=backend,
    )
    assert got.tolist() == brute_force(queries @ gallery.T, query_group, gallery_group)


@pytest.mark.parametrize(("block_k", "block_n"), [(1, 16), (2, 8), (16, 1), (64, 64)])
def test_kernel_is_equal_in_any_block(block_k: int, block_n: int, device) -> None:
    pytest.importorskip("triton")
    from fastmat.kernels.ranks import launch_ranks

    generator = torch.Generator().manual_seed(2)
    table = whole_numbers(4, 17, generator=generator)
    table[1, 3], table[2, :9] = math.nan, -math.inf
    query_group, gallery_group = groups(4, 17, 2, generator)
    positives = [t.to(device) for t in module._positives(query_group, gallery_group)]
    got = torch.full((4,), -99, device=device)
    launch_ranks(table.to(device), *positives, got, block_k=block_k, block_n=block_n)
    assert got.tolist() == brute_force(table, query_group, gallery_group)


@pytest.mark.parametrize("block_k", [1, 2, 4])
def test_positives_that_tie_in_several_blocks_are_all_its_own(block_k: int, device) -> None:
    pytest.importorskip("triton")
    from fastmat.kernels.ranks import launch_ranks

    table, gallery_group = torch.ones(2, 17), torch.tensor([0] * 8 + [1] * 9)
    table[1, 12:] = 2.0
    positives = [t.to(device) for t in module._positives(torch.tensor([0, 1]), gallery_group)]
    got = torch.full((2,), -99, device=device)
    launch_ranks(table.to(device), *positives, got, block_k=block_k)
    assert got.tolist() == [4, 0] == brute_force(table, torch.tensor([0, 1]), gallery_group)


def test_float64_scores_are_compared_as_such(backend, device) -> None:
    table = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 + 1e-12, 1.0 - 1e-12]], dtype=torch.float64, device=device)
    ids = {"query_group": torch.tensor([0], device=device), "gallery_group": torch.arange(4, device=device)}
    assert ranks_of_scores(table, **ids, backend=backend).tolist() == [2]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), q=st.integers(1, 6), g=st.integers(1, 24), kinds=st.integers(1, 8))
def test_properties(seed: int, q: int, g: int, kinds: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = whole_numbers(q, 2, generator=generator), whole_numbers(g, 2, generator=generator)
    query_group, gallery_group = groups(q, g, kinds, generator)
    ranks = retrieval_ranks(queries, gallery, query_group=query_group, gallery_group=gallery_group)
    others = (query_group[:, None] != gallery_group[None, :]).sum(1)
    assert (ranks >= 0).all() and (ranks <= others).all()

    shuffle = torch.randperm(g, generator=generator)
    shuffled = {"query_group": query_group, "gallery_group": gallery_group[shuffle]}
    assert torch.equal(retrieval_ranks(queries, gallery[shuffle], **shuffled), ranks)

    table = queries @ gallery.T
    new = torch.cat([gallery_group, torch.tensor([1])])  # a group of nobody: all others are multiples of seven
    for value, change in ((-99.0, 0), (99.0, 1), (math.nan, 1)):
        wider = torch.cat([table, torch.full((q, 1), value)], 1)
        assert torch.equal(ranks_of_scores(wider, query_group=query_group, gallery_group=new), ranks + change)


def test_empty(backend) -> None:
    none, group = torch.empty(0, 4), torch.empty(0, dtype=torch.int64)
    for gallery in (torch.ones(3, 4), none):
        ids = {"query_group": group, "gallery_group": torch.arange(len(gallery)), "backend": backend}
        for got in (retrieval_ranks(none, gallery, **ids), ranks_of_scores(torch.empty(0, len(gallery)), **ids)):
            assert got.shape == (0,) and got.dtype == torch.int64


def test_outside_autograd_and_autocast(backend) -> None:
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(8, 64, generator=generator).requires_grad_()
    gallery = torch.randn(40, 64, generator=generator).requires_grad_()
    ids = {"query_group": torch.arange(8), "gallery_group": torch.arange(40) % 8, "backend": backend}
    plain = retrieval_ranks(queries, gallery, **ids)
    with torch.autocast("cpu", torch.bfloat16):
        inside = retrieval_ranks(queries, gallery, **ids)
    assert torch.equal(inside, plain) and not plain.requires_grad
    assert plain.tolist() == brute_force(
        queries.double() @ gallery.double().T, ids["query_group"], ids["gallery_group"]
    )
    assert not ranks_of_scores(queries @ gallery.T, **ids).requires_grad


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator gives, and the operator."""

    elements, name = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            # Views (a transposed gallery) are no allocations.
            if isinstance(tensor, Tensor) and tensor._base is None and tensor.numel() > self.elements:
                self.elements, self.name = tensor.numel(), str(func)
        return out


@pytest.mark.parametrize("kinds", [1, 40])
def test_nothing_larger_than_the_tile_is_made(kinds: int, monkeypatch) -> None:
    """The matrix would be 100 times the tile; one kind: every column is a positive of every query."""
    generator = torch.Generator().manual_seed(4)
    queries, gallery = torch.randn(400, 4, generator=generator), torch.randn(1000, 4, generator=generator)
    query_group, gallery_group = groups(400, 1000, kinds, generator)
    monkeypatch.setattr(scores, "TILE_BYTES", {"cpu": 4 * 4 * len(gallery)})
    monkeypatch.setattr(module, "BLOCK", 2 * len(gallery))
    with LargestTensor() as largest:
        order, first, count = module._positives(query_group, gallery_group)
        for rows, _, tile in scores.score_tiles(queries, gallery, columns=len(gallery)):
            module.ranks_reference(tile, order, first[rows], count[rows], first[rows])
    assert 0 < largest.elements <= 4 * len(gallery), largest.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.ones(2, 3, dtype=torch.int64)}, "queries must be float32"),
        ({"queries": torch.ones(2, 3).half()}, "gallery must be float16, got float32"),
        ({"queries": torch.ones(6)}, "queries must have shape"),
        ({"gallery": torch.ones(4, 5)}, "gallery has 5 features per row, queries 3"),
        ({"gallery": torch.ones(4, 3, device="meta")}, "gallery is on meta"),
        ({"gallery": torch.ones(0, 3), "gallery_group": torch.empty(0, dtype=torch.int64)}, "gallery_group is empty"),
        ({"query_group": torch.tensor([0, 9])}, r"query_group\[1\] is 9, which is nowhere in gallery_group"),
        ({"query_group": torch.tensor([0.0, 1.0])}, "query_group must be int64"),
        ({"query_group": torch.tensor([0])}, r"query_group must have shape \(2,\) \(one per query\)"),
        ({"gallery_group": torch.arange(5)}, r"gallery_group must have shape \(4,\)"),
        ({"gallery_group": torch.arange(4, device="meta")}, "gallery_group is on meta"),
        ({"backend": "cuda"}, "names no backend"),
    ],
)
def test_bad_input(change, message: str) -> None:
    good = {
        "queries": torch.ones(2, 3),
        "gallery": torch.ones(4, 3),
        "query_group": torch.tensor([0, 1]),
        "gallery_group": torch.tensor([0, 1, 1, 2]),
    }
    with pytest.raises(UserError, match=message):
        retrieval_ranks(**good | change)


@pytest.mark.parametrize(
    ("table", "message"),
    [(torch.ones(2, 4, dtype=torch.int32), "scores must be float32"), (torch.ones(8), "scores must have shape")],
)
def test_bad_scores(table: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ranks_of_scores(table, query_group=torch.tensor([0, 1]), gallery_group=torch.tensor([0, 1, 1, 2]))


def test_opcheck(backend, device) -> None:
    queries, gallery = torch.eye(3, device=device), torch.eye(5, 3, device=device)
    query_group, gallery_group = torch.arange(3, device=device), torch.arange(5, device=device) % 3
    torch.library.opcheck(module._retrieval_ranks, (queries, gallery, query_group, gallery_group, backend))
    torch.library.opcheck(module._ranks_of_scores, (queries @ gallery.T, query_group, gallery_group, backend))


def test_compiles_in_one_graph(backend, device) -> None:
    group = torch.arange(5, device=device)
    features = torch.eye(5, device=device, requires_grad=True)

    def both(a: Tensor, b: Tensor) -> Tensor:
        ranks = retrieval_ranks(2 * a, b, query_group=group, gallery_group=group, backend=backend)
        return ranks + ranks_of_scores(a @ b.T, query_group=group, gallery_group=group, backend=backend)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features, features.flip(0)), both(features, features.flip(0)))
