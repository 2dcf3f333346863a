"""The shortlist against sorting Python numbers, by both backends; any tile and block; zeros and NaN; bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.tolerances import TOLERANCES
from torch import Tensor

from fastmat.errors import UserError
from fastmat.ops import scores
from fastmat.ops import shortlist as module
from fastmat.ops.shortlist import topk_shortlist


def by_sorting(table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sorted by score, NaN last, then by index, in Python."""
    rows = []
    for row in table.tolist():
        order = sorted(range(len(row)), key=lambda i: (math.isnan(row[i]), -row[i] if row[i] == row[i] else 0, i))
        rows.append(order[:k])
    indices = torch.tensor(rows, dtype=torch.int64).view(len(table), k)
    return table.gather(1, indices), indices


def whole_numbers(*shape: int, generator: torch.Generator) -> Tensor:
    """Few values, so that scores tie, and exact sums in any order."""
    return torch.randint(-2, 3, shape, generator=generator).float()


def check(queries: Tensor, gallery: Tensor, k: int, want: tuple[Tensor, Tensor], backend: str) -> None:
    found, indices = topk_shortlist(queries, gallery, k, backend=backend)
    assert found.dtype == torch.float32 and indices.dtype == torch.int64
    assert torch.equal(indices.cpu(), want[1])
    torch.testing.assert_close(found.cpu(), want[0].float(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("q", "g", "k"), [(1, 1, 1), (3, 31, 31), (2, 32, 5), (3, 33, 1), (5, 67, 1), (2, 200, 3), (2, 225, 2)]
)
def test_against_sorting(q: int, g: int, k: int, dtype: torch.dtype, backend, device) -> None:
    generator = torch.Generator().manual_seed(g)
    queries, gallery = whole_numbers(q, 3, generator=generator), whole_numbers(g, 3, generator=generator)
    want = by_sorting(queries @ gallery.T, k)
    check(queries.to(device, dtype), gallery.to(device, dtype), k, want, backend)


@pytest.mark.parametrize("k", [1, 2, 40, 230])
@pytest.mark.parametrize("seed", range(3))
def test_nan_comes_last_and_infinity_in_its_place(seed: int, k: int, backend, device) -> None:
    generator = torch.Generator().manual_seed(seed)
    gallery = whole_numbers(230, 1, generator=generator)
    for value in (math.nan, math.inf, -math.inf):
        gallery[torch.rand(230, generator=generator) < 0.2] = value
    gallery[64:128] = math.nan  # whole groups of nothing else
    queries = torch.tensor([[1.0], [-1.0], [0.0], [math.nan]])
    want = by_sorting(queries @ gallery.T, k)
    check(queries.to(device), gallery.to(device), k, want, backend)


def test_zeros_of_both_signs_tie(backend, device) -> None:
    gallery = torch.tensor([-1.0, -0.0, 0.0, -0.0, 0.0]).view(5, 1)
    found, indices = topk_shortlist(torch.ones(1, 1, device=device), gallery.to(device), 4, backend=backend)
    assert indices.tolist() == [[1, 2, 3, 4]] and (found == 0).all()


@pytest.mark.parametrize(("budget", "columns"), [(1, 1), (300, 40), (10**4, 64), (10**4, 99), (10**6, 10**6)])
@pytest.mark.parametrize("k", [1, 2, 70])
def test_equal_in_any_tile(budget: int, columns: int, k: int, device, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(k)
    queries, gallery = whole_numbers(5, 3, generator=generator), whole_numbers(201, 3, generator=generator)
    gallery[torch.arange(201) % 17 == 0] = math.nan
    monkeypatch.setattr(scores, "TILE_BYTES", {"cpu": budget, "cuda": budget})
    monkeypatch.setattr(module, "COLUMNS", columns)
    monkeypatch.setattr(module, "BLOCK", budget // 4 + 1)
    check(queries.to(device), gallery.to(device), k, by_sorting(queries @ gallery.T, k), "reference")


@pytest.mark.parametrize(("columns", "k"), [(70, 1), (130, 2), (70, 90)])
def test_kernels_are_equal_in_any_tile(columns: int, k: int, device, monkeypatch) -> None:
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(columns)
    queries, gallery = whole_numbers(2, 3, generator=generator), whole_numbers(171, 3, generator=generator)
    monkeypatch.setattr(module, "COLUMNS", columns)
    check(queries.to(device), gallery.to(device), k, by_sorting(queries @ gallery.T, k), "triton")


@pytest.mark.parametrize("block_g", [1, 2, 4, 16])
@pytest.mark.parametrize("total", [1, 63, 64, 65])
def test_kernels_give_the_keys_of_the_reference_in_any_block(total: int, block_g: int, device) -> None:
    pytest.importorskip("triton")
    from fastmat.kernels.shortlist import GROUP, launch_column_keys, launch_group_keys

    assert GROUP == module.GROUP
    generator = torch.Generator().manual_seed(total)
    table = torch.randn(2, total, generator=generator)
    table[:, ::5], table[:, ::7], table[:, 40:] = math.nan, -0.0, math.nan
    groups = -(-total // GROUP)
    maxima = module._group_maximum(module._images_of(table))
    group_keys = torch.full((2, groups), -99, device=device)
    launch_group_keys(table.to(device), group_keys, block_g=block_g)
    assert torch.equal(group_keys.cpu(), module._pack(maxima, torch.arange(groups)))

    backwards = torch.arange(groups).flip(0).expand(2, -1)
    chosen = module._pack(torch.full((2, groups), -7, dtype=torch.int32), backwards).to(device)
    keys = torch.full((2, groups * GROUP), -99, device=device)
    launch_column_keys(table.to(device), chosen, keys, first_index=1000, block_g=block_g)
    assert torch.equal(keys.cpu(), module._column_keys(table, backwards, 1000))
    launch_column_keys(table.to(device), None, keys, first_index=1000, block_g=block_g)
    assert torch.equal(keys[:, :total].cpu(), module._column_keys(table, None, 1000))
    assert (keys[:, total:] == module.LOWEST).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), q=st.integers(1, 4), g=st.integers(1, 150), data=st.data())
def test_properties(seed: int, q: int, g: int, data) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = whole_numbers(q, 2, generator=generator), whole_numbers(g, 2, generator=generator)
    k = data.draw(st.integers(1, g))
    found, indices = topk_shortlist(queries, gallery, k)
    assert torch.equal((queries @ gallery.T).gather(1, indices), found)
    everything = topk_shortlist(queries, gallery, g)
    assert torch.equal(everything[1][:, :k], indices), "a shorter list is the head of a longer one"
    assert torch.equal(everything[1].sort().values, torch.arange(g).expand(q, -1))
    wider = torch.cat([gallery, torch.full((1, 2), math.nan)])
    assert torch.equal(topk_shortlist(queries, wider, k)[1], indices)


def test_scores_are_the_dot_products(backend, device) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(3, 19, generator=generator), torch.randn(300, 19, generator=generator)
    found, indices = topk_shortlist(queries.to(device), gallery.to(device), 4, backend=backend)
    want = (queries.double() @ gallery.double().T).topk(4)
    assert torch.equal(indices.cpu(), want.indices)
    torch.testing.assert_close(found.cpu().double(), want.values, **TOLERANCES[torch.float32])


def test_outside_autograd_and_autocast(backend) -> None:
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(3, 19, generator=generator).requires_grad_()
    gallery = torch.randn(100, 19, generator=generator).requires_grad_()
    plain = topk_shortlist(queries, gallery, 2, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        inside = topk_shortlist(queries, gallery, 2, backend=backend)
    assert torch.equal(inside[0], plain[0]) and torch.equal(inside[1], plain[1]) and not plain[0].requires_grad


def test_any_strides_and_no_queries(backend, device) -> None:
    generator = torch.Generator().manual_seed(2)
    queries = whole_numbers(4, 3, generator=generator).to(device)
    gallery = whole_numbers(90, 3, generator=generator).to(device)
    want = topk_shortlist(queries, gallery, 2, backend=backend)
    got = topk_shortlist(queries.T.contiguous().T, gallery.repeat(1, 2)[:, :3], 2, backend=backend)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    none = topk_shortlist(queries[:0], gallery, 2, backend=backend)
    assert none[0].shape == none[1].shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.ones(2, 3).double()}, "queries must be float32"),
        ({"queries": torch.ones(2, 3).half()}, "gallery must be float16, got float32"),
        ({"gallery": torch.ones(4, 3, 1)}, "gallery must have shape"),
        ({"gallery": torch.ones(4, 5)}, "gallery has 5 features per row, queries 3"),
        ({"gallery": torch.ones(4, 3, device="meta")}, "gallery is on meta"),
        ({"gallery": torch.ones(0, 3)}, "k must be a whole number from 1 to the 0 rows"),
        ({"gallery": torch.ones(1, 3).expand(2**31, 3)}, r"gallery must have fewer than 2\^31 rows"),
        ({"k": 0}, "k must be a whole number from 1 to the 4 rows of the gallery, got 0"),
        ({"k": 5}, "got 5"),
        ({"k": 1.5}, "got 1.5"),
        ({"backend": "cuda"}, "names no backend"),
    ],
)
def test_bad_input(change, message: str) -> None:
    good = {"queries": torch.ones(2, 3), "gallery": torch.ones(4, 3), "k": 2}
    with pytest.raises(UserError, match=message):
        topk_shortlist(**good | change)


def test_opcheck(backend, device) -> None:
    queries, gallery = torch.eye(3, device=device), torch.eye(70, 3, device=device)
    for k in (1, 5):
        torch.library.opcheck(module._topk_shortlist, (queries, gallery, k, backend))


def test_compiles_in_one_graph(backend, device) -> None:
    queries, gallery = torch.eye(3, device=device, requires_grad=True), torch.eye(70, 3, device=device)

    def shortlist(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        found, indices = topk_shortlist(2 * a, b, 2, backend=backend)
        return found + 1, indices

    compiled = torch.compile(shortlist, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(queries, gallery), shortlist(queries, gallery), strict=True):
        assert torch.equal(got, want)
