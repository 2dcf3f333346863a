"""Contrastive operators: kernels against the reference, the reference against dense float64 formulas and gradcheck."""

import math
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.tolerances import TOLERANCES
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fastmat.ops import contrastive_loss, contrastive_rows, contrastive_statistics, contrastive_tiles

FLOAT64 = torch.float64
# Tiles of 4 x 6, with remainders and without; those of (13, 9, 5) lie in the memory of its gradient.
SHAPES = [(1, 1, 1), (1, 9, 5), (9, 1, 5), (7, 13, 3), (8, 5, 33), (13, 9, 5)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in contrastive_tiles.TILE:
        monkeypatch.setitem(contrastive_tiles.TILE, device, (4, 6))


def unit(n: int, seed: int, dim: int = 5, dtype: torch.dtype = FLOAT64) -> torch.Tensor:
    features = torch.randn(n, dim, dtype=FLOAT64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(features, dim=-1).to(dtype)


def dense_statistics(rows, columns, scale, row_group, column_group, negatives_only=False):
    logits = scale * rows @ columns.T
    positive = row_group[:, None] == column_group
    match = torch.where(positive, logits, 0.0)
    kept = logits.masked_fill(positive, -torch.inf) if negatives_only else logits
    return kept.logsumexp(1), match.sum(1), kept.logsumexp(0), match.sum(0)


def dense_rows(rows, columns, scale, row_group, column_group, soft_rows=None, soft_weight=0.0):
    """The cross-entropy with a written-out target matrix."""
    logits = scale * rows @ columns.T
    hard = (row_group[:, None] == column_group).to(logits.dtype)
    target = hard / hard.sum(1, keepdim=True)
    if soft_rows is not None:
        soft = torch.as_tensor(scale).detach() * soft_rows.detach() @ columns.detach().T
        target = soft_weight * soft.softmax(1) + (1 - soft_weight) * target
    return -(target * logits.log_softmax(1)).sum(1)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got.cpu().to(FLOAT64), want.cpu().to(FLOAT64), **TOLERANCES[dtype])


# The whole operator, through one tile and through many


@pytest.mark.parametrize("column_side", [True, False])
@pytest.mark.parametrize("negatives_only", [False, True])
@pytest.mark.parametrize(("n", "m", "dim"), SHAPES)
@pytest.mark.usefixtures("small_tiles")
def test_statistics_and_gradients(n, m, dim, negatives_only, column_side, backend, device):
    rows, columns = unit(n, 0, dim, torch.float32), unit(m, 1, dim, torch.float32)
    row_group, column_group = torch.arange(n) % 4, torch.arange(m) % 3
    inputs = [rows.to(device), columns.to(device), torch.tensor(7.0, device=device)]
    exact = [tensor.cpu().to(FLOAT64).requires_grad_() for tensor in inputs]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    got = contrastive_statistics(
        *inputs,
        row_group.to(device),
        column_group.to(device),
        negatives_only=negatives_only,
        column_side=column_side,
        backend=backend,
    )
    want = dense_statistics(*exact, row_group, column_group, negatives_only)
    want = want if column_side else want[:2]
    assert [len(part) for part in got] == [n, n, m, m] if column_side else [n, n, 0, 0]
    value = expected = 0.0
    for i, (part, truth) in enumerate(zip(got, want, strict=False)):
        close(part.detach(), truth.detach(), torch.float32)
        seed = torch.linspace(-1, 2, len(truth), dtype=FLOAT64) + i
        finite = truth.isfinite()
        value = value + (part * seed.to(part))[finite].sum()
        expected = expected + (truth * seed)[finite].sum()
    for gradient, truth in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, exact), strict=True):
        # Where a row has no negative, the dense formula's own gradient is NaN: its softmax of -inf is 0/0.
        close(gradient, truth.nan_to_num(nan=0.0) if negatives_only else truth, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype, backend, device):
    rows, columns = unit(9, 2, 16, dtype), unit(9, 3, 16, dtype)
    inputs = [rows.to(device).requires_grad_(), columns.to(device).requires_grad_()]
    exact = [rows.to(FLOAT64).requires_grad_(), columns.to(FLOAT64).requires_grad_()]
    value = contrastive_loss(*inputs, 100.0, backend=backend)
    ids = torch.arange(9)
    want = (dense_rows(*exact, 100.0, ids, ids).mean() + dense_rows(*exact[::-1], 100.0, ids, ids).mean()) / 2
    assert value.dtype == torch.float32
    close(value.detach(), want.detach(), torch.float32)
    for gradient, truth in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(want, exact), strict=True):
        assert gradient.dtype == dtype
        close(gradient, truth, dtype)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, FLOAT64)])
def test_features_of_two_dtypes_meet_in_the_wider(dtypes, backend, device):
    narrow, wide = dtypes
    rows, columns = unit(5, 4).to(device, narrow), unit(5, 5).to(device, wide)
    soft = {"soft_rows": columns, "soft_weight": 0.5, "queue": columns, "queue_group": torch.arange(5, device=device)}
    got = contrastive_rows(rows, columns, 5.0, **soft, backend=backend)
    assert torch.equal(got, contrastive_rows(rows.to(wide), columns, 5.0, **soft, backend=backend))


def test_diagonal_is_clip_loss(backend, device):
    images, texts = unit(6, 2).float(), unit(6, 3).float()
    logits = 10 * images @ texts.T
    want = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    close(contrastive_loss(images.to(device), texts.to(device), 10.0, backend=backend), want, torch.float32)
    ids = torch.tensor([5, 3, 8, 1, 0, 2])
    assert contrastive_loss(images, texts, 10.0, image_group=ids, text_group=ids) == contrastive_loss(images, texts, 10)


@pytest.mark.parametrize(
    ("row_group", "column_group"),
    [([0, 1, 2], [0, 0, 1, 2, 2]), ([0, 0, 1, 1, 2], [2, 0, 1]), ([3] * 4, [3] * 5), ([0, 7, 0, 7], [7, 7, 0, 9])],
    ids=["1:N", "N:1", "all positive", "duplicates"],
)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_positives_by_id(row_group, column_group, scale, backend, device):
    row_group, column_group = torch.tensor(row_group), torch.tensor(column_group)
    rows, columns = unit(len(row_group), 6).float(), unit(len(column_group), 7).float()
    got = contrastive_rows(
        rows.to(device),
        columns.to(device),
        scale,
        row_group=row_group.to(device),
        column_group=column_group.to(device),
        backend=backend,
    )
    # fp32 logits of size 100 are known to 1e-5 of that.
    want = dense_rows(rows.double(), columns.double(), scale, row_group, column_group)
    torch.testing.assert_close(got.cpu().double(), want, atol=1e-6 * max(10.0, scale), rtol=1e-5)


def test_identical_rows_at_scale_100(backend, device):
    rows = unit(1, 8).float().expand(11, 5).to(device)
    scale = torch.tensor(100.0, device=device, requires_grad=True)
    value = contrastive_loss(rows, rows, scale, backend=backend)
    assert float(value.detach()) == pytest.approx(math.log(11), rel=1e-5)
    assert float(torch.autograd.grad(value, scale)[0]) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nearly_orthogonal_and_opposite_rows_at_scale_100(sign, backend, device):
    """A fixed maximum of 100 would find exp(-100) or exp(-200) everywhere and answer -inf."""
    rows, columns = sign * torch.eye(4, 8), torch.eye(8)[4:]
    columns = columns if sign > 0 else rows.neg()
    got = contrastive_statistics(
        rows.to(device), columns.to(device), 100.0, *[torch.arange(4, device=device)] * 2, backend=backend
    )
    close(got.row_lse, torch.full((4,), math.log(4) if sign > 0 else math.log(3)), torch.float32)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_in_is_not_finite_out(bad, backend, device):
    rows, columns = unit(7, 9).float(), unit(7, 10).float()
    rows[5, 2] = bad
    rows = rows.to(device).requires_grad_()
    value = contrastive_rows(rows, columns.to(device), 3.0, backend=backend)
    assert not value[5].isfinite() and value.isfinite().sum() == 6
    assert not torch.autograd.grad(value.sum(), rows)[0][5].isfinite().all()


def test_a_bad_upstream_gradient_stays_in_its_row(backend, device):
    rows, columns = unit(5, 9).float().to(device).requires_grad_(), unit(5, 10).float().to(device)
    value = contrastive_rows(rows, columns, 3.0, backend=backend)
    seeds = torch.tensor([[1.0, 2.0, torch.nan, torch.inf, 3.0], [1.0, 2.0, 0.0, 0.0, 3.0]], device=device)
    bad, good = (torch.autograd.grad(value, rows, seed, retain_graph=True)[0] for seed in seeds)
    torch.testing.assert_close(bad[[0, 1, 4]], good[[0, 1, 4]])
    assert not bad[2:4].isfinite().any()


def test_any_strides(backend, device):
    rows, columns = unit(6, 33, 10).float().to(device)[::2, ::2], unit(5, 34, 10).float().to(device).T[:5].T
    ids = torch.arange(20, device=device) // 4
    strided = rows, columns, ids[:9:3], ids[::4]
    plain = [part.contiguous() for part in strided]
    losses = [
        contrastive_rows(a, b, 4.0, row_group=c, column_group=d, backend=backend) for a, b, c, d in (strided, plain)
    ]
    close(*losses, torch.float32)
    found = [contrastive_statistics(a, b, 4.0, c, d, backend=backend) for a, b, c, d in (strided, plain)]
    close(torch.cat(found[0]), torch.cat(found[1]), torch.float32)
    queued = [
        contrastive_rows(columns, columns, 4.0, queue=columns, queue_group=group, backend=backend)
        for group in (ids[::4], ids[::4].contiguous())
    ]
    close(*queued, torch.float32)


def test_tiny_upstream_gradients_keep_their_digits(backend, device):
    rows, columns = unit(6, 11).float().to(device).requires_grad_(), unit(6, 12).float().to(device)
    value = contrastive_loss(rows, columns, 10.0, backend=backend)
    (plain,) = torch.autograd.grad(value, rows, retain_graph=True)
    (tiny,) = torch.autograd.grad(value * 1e-30, rows)
    torch.testing.assert_close(tiny * 1e30, plain)


def test_scale_zero_has_a_gradient(backend, device):
    rows, columns = unit(4, 13).float().to(device), unit(4, 14).float().to(device)
    scale = torch.tensor([0.0], device=device, requires_grad=True)
    value = contrastive_loss(rows, columns, scale, backend=backend)
    want = (rows @ columns.T).mean() - (rows * columns).sum(1).mean()
    close(torch.autograd.grad(value, scale)[0], want[None], torch.float32)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone(wanted, backend, device):
    def gradients(flags):
        inputs = [unit(5, 15).float().to(device), unit(7, 16).float().to(device), torch.tensor(4.0, device=device)]
        inputs = [tensor.requires_grad_(flag) for tensor, flag in zip(inputs, flags, strict=True)]
        ids = [torch.arange(n, device=device) % 3 for n in (5, 7)]
        value = contrastive_loss(*inputs, image_group=ids[0], text_group=ids[1], backend=backend)
        return torch.autograd.grad(value, [tensor for tensor in inputs if tensor.requires_grad])

    everything = gradients((True, True, True))
    torch.testing.assert_close(gradients(wanted)[0], everything[wanted.index(True)])


def test_empty_rows(backend, device):
    none = torch.zeros(0, 4, device=device, requires_grad=True)
    columns = unit(3, 17, 4).float().to(device).requires_grad_()
    ids = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    value = contrastive_rows(none, columns, 2.0, row_group=ids[0], column_group=ids[1], backend=backend)
    assert value.shape == (0,)
    gradients = torch.autograd.grad(value.sum(), (none, columns))
    assert gradients[0].shape == (0, 4) and torch.equal(gradients[1], torch.zeros_like(columns))
    found = contrastive_statistics(none, columns, 2.0, *ids, backend=backend)
    assert (found.column_lse == -torch.inf).all() and (found.column_match == 0).all()
    value = contrastive_rows(none, none, 2.0, soft_rows=none.detach(), soft_weight=0.5, backend=backend)
    assert value.shape == (0,) and torch.autograd.grad(value.sum(), none)[0].shape == (0, 4)


# Queue and soft targets


def queued(device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Rows and columns, and a queue stored as ALBEF stores it, [D, Q], seen through its transposed view."""
    parts = {"rows": unit(5, 18), "columns": unit(4, 19), "queue": unit(9, 20).T.contiguous(), "soft_rows": unit(5, 21)}
    parts = {name: part.to(device, dtype) for name, part in parts.items()}
    ids = {"row_group": [0, 1, 2, 3, 3], "column_group": [0, 1, 2, 3], "queue_group": [3, 9, 9, 0, 9, 9, 9, 1, 0]}
    groups = {name: torch.tensor(values, device=device) for name, values in ids.items()}
    return {**parts, "queue": parts["queue"].T, **groups}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("soft_weight", [0.0, 0.4, 1.0])
def test_queue_and_soft_targets(soft_weight, backend, device):
    given = queued(device, torch.float32)
    scale = torch.tensor(6.0, device=device, requires_grad=True)
    given["rows"].requires_grad_()
    given["columns"].requires_grad_()
    got = contrastive_rows(
        given.pop("rows"), given.pop("columns"), scale, soft_weight=soft_weight, backend=backend, **given
    )
    del scale, given
    exact = {name: part.cpu() for name, part in queued(device, FLOAT64).items()}
    columns = torch.cat([exact["columns"], exact["queue"]])
    groups = exact["row_group"], torch.cat([exact["column_group"], exact["queue_group"]])
    close(
        got.detach(), dense_rows(exact["rows"], columns, 6.0, *groups, exact["soft_rows"], soft_weight), torch.float32
    )


@pytest.mark.usefixtures("small_tiles")
def test_gradients_through_queue_and_soft_targets(backend, device):
    def leaves(given):
        return [given["rows"].requires_grad_(), given["columns"].requires_grad_()]

    given, exact = queued(device, torch.float32), {k: v.cpu() for k, v in queued(device, FLOAT64).items()}
    inputs = [*leaves(given), torch.tensor(6.0, device=device, requires_grad=True)]
    truths = [*leaves(exact), torch.tensor(6.0, dtype=FLOAT64, requires_grad=True)]
    rest = {name: given[name] for name in ("row_group", "column_group", "queue", "queue_group", "soft_rows")}
    value = contrastive_rows(*inputs, **rest, soft_weight=0.4, backend=backend)
    columns = torch.cat([truths[1], exact["queue"]])
    groups = exact["row_group"], torch.cat([exact["column_group"], exact["queue_group"]])
    want = dense_rows(truths[0], columns, truths[2], *groups, exact["soft_rows"], 0.4)
    seed = torch.linspace(-1, 2, 5, dtype=FLOAT64)
    found = torch.autograd.grad((value * seed.to(value)).sum(), inputs)
    for gradient, truth in zip(found, torch.autograd.grad((want * seed).sum(), truths), strict=True):
        close(gradient, truth, torch.float32)


def test_a_queue_of_negatives_for_the_diagonal():
    rows, columns, queue = unit(3, 22), unit(3, 23), unit(8, 24)
    got = contrastive_rows(rows, columns, 2.0, queue=queue, queue_group=torch.full((8,), -1))
    close(got, dense_rows(rows, torch.cat([columns, queue]), 2.0, torch.arange(3), torch.arange(11)), FLOAT64)


# The reference alone: float64, memory


@pytest.mark.usefixtures("small_tiles")
def test_gradcheck():
    images, texts = unit(4, 4).requires_grad_(), unit(7, 5).requires_grad_()
    scale = torch.tensor(3.0, dtype=FLOAT64, requires_grad=True)
    image_group, text_group = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 2, 2, 1, 0])

    def loss(a, b, s):
        return contrastive_loss(a, b, s, image_group=image_group, text_group=text_group)

    assert torch.autograd.gradcheck(loss, (images, texts, scale))


@pytest.mark.usefixtures("small_tiles")
def test_gradcheck_through_the_queue():
    given = queued(torch.device("cpu"), FLOAT64)
    scale = torch.tensor(2.0, dtype=FLOAT64, requires_grad=True)
    inputs = given.pop("rows").requires_grad_(), given.pop("columns").requires_grad_(), scale
    del given["soft_rows"]  # their softmax is a constant to autograd, though not to finite differences
    assert torch.autograd.gradcheck(lambda *moved: contrastive_rows(*moved, **given), inputs)


def test_no_tensor_is_as_large_as_the_logits():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    rows, columns, scale = unit(1500, 25).float(), unit(1300, 26).float(), torch.tensor(5.0)
    groups = torch.arange(1500), torch.arange(1300)
    with Largest() as largest:
        row_state, column_state = contrastive_tiles.fold_tiles(rows, columns, scale, *groups, False, True, "reference")
        lse = [state[0] + state[1].log() for state in (row_state, column_state)]
        states = [torch.stack([part, torch.ones_like(part), torch.zeros_like(part)]) for part in lse]
        contrastive_tiles.weigh_tiles(
            rows, columns, scale, *states, *groups, False, rows, columns, scale, torch.float32, "reference"
        )
    height, width = contrastive_tiles.TILE["cpu"]
    assert largest.numel <= height * width < 1500 * 1300 / 4


@pytest.mark.parametrize(("dim", "tiles"), [(64, 1.0), (128, 0.25), (256, 0.5), (512, 1.0)])
def test_the_backward_holds_its_results_and_a_part_of_a_tile(dim, tiles, monkeypatch):
    """128 here is 512 for 16384 features and tiles of 2048 x 2048: their areas are in one proportion."""
    weighed = []

    def weigh(tile, out, *rest):  # like the kernel it takes no memory
        weighed.append(tile)
        out.zero_()

    monkeypatch.setattr(contrastive_tiles, "weigh_reference", weigh)
    n, (height, width) = 4096, contrastive_tiles.TILE["cpu"]
    rows, scale, state, ids = torch.rand(n, dim), torch.tensor(5.0), torch.rand(3, n), torch.arange(n)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        contrastive_tiles.weigh_tiles(
            rows, rows, scale, state, state, ids, ids, False, rows, rows, scale, torch.float32, "reference"
        )
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(accumulate(event.nbytes() for event in events))
    vectors = 16 * 4 * n
    assert 2 * rows.nbytes < peak <= 2 * rows.nbytes + tiles * 4 * height * width + vectors
    assert len(weighed) <= 2 * (n // height) * (n // width)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(("n", "m"), [(0, 5), (1, 1), (8, 25_000), (100_000, 3), (3000, 3000), (2048, 65_536)])
def test_tiles_have_one_area(n, m, device_type):
    height, width = contrastive_tiles._tile_shape(n, m, torch.device(device_type))
    area = math.prod(contrastive_tiles.TILE[device_type])
    assert 1 <= height * width <= area
    assert height * width >= min(n * m, area) / 2
    assert width == m or (width < m and width % 64 == 0)


# The kernels alone, in other blocks than the operator's


@pytest.mark.parametrize("negatives_only", [False, True])
@pytest.mark.parametrize("column_side", [True, False])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 5), (8, 8), (9, 7)])
def test_kernels_in_any_block_size(n, m, column_side, negatives_only, device):
    pytest.importorskip("triton")
    from fastmat.kernels.contrastive import launch_fold, launch_weigh

    generator = torch.Generator().manual_seed(n)
    tile = torch.randn(n, m, generator=generator).to(device)
    groups = (torch.arange(n, device=device) % 2, torch.arange(m, device=device) % 3)
    scale = torch.tensor(3.0, device=device)
    states = [torch.rand(3, n, generator=generator), torch.rand(3, m, generator=generator)]
    states = [state.to(device) for state in states]

    def folded(function, **blocks):
        row, column = (state.clone() for state in states)
        function(tile.clone(), scale, row, column if column_side else None, *groups, negatives_only, **blocks)
        return row, column

    def weighed(function, out, **blocks):
        column = states[1] if column_side else None
        function(tile.clone(), out, scale, states[0], column, *groups, negatives_only, **blocks)
        return out

    want = folded(contrastive_tiles.fold_reference)
    for blocks in ({}, {"block": 4, "lines": 2}, {"block": 16, "lines": 16}, {"block": 8, "lines": 1}):
        torch.testing.assert_close(folded(launch_fold, **blocks), want)
    want = weighed(contrastive_tiles.weigh_reference, torch.full_like(tile, torch.nan))
    for blocks in ({}, {"block_n": 2, "block_m": 4}, {"block_n": 8, "block_m": 1}):
        torch.testing.assert_close(weighed(launch_weigh, torch.full_like(tile, torch.nan), **blocks), want)
    low = weighed(launch_weigh, torch.full_like(tile, torch.nan, dtype=torch.float16))
    torch.testing.assert_close(low, want.half(), **TOLERANCES[torch.float16])


def test_weigh_in_place(device):
    pytest.importorskip("triton")
    from fastmat.kernels.contrastive import launch_weigh

    tile = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(device)
    arguments = torch.tensor(2.0, device=device), torch.rand(3, 5, device=device), torch.rand(3, 6, device=device)
    groups = torch.arange(5, device=device), torch.arange(6, device=device)
    apart = torch.empty_like(tile)
    launch_weigh(tile, apart, *arguments, *groups, False)
    launch_weigh(tile, tile, *arguments, *groups, False)
    assert torch.equal(tile, apart)


# Properties


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_properties(data):
    """Order does not matter, tiles do not matter, and one positive among others never costs less than nothing."""
    n, m = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    rows, columns = unit(n, data.draw(st.integers(0, 99))), unit(m, 100)
    column_group = torch.arange(m) if data.draw(st.booleans()) else torch.arange(m) % 2
    row_group = torch.tensor(data.draw(st.lists(st.integers(0, int(column_group.max())), min_size=n, max_size=n)))
    scale = data.draw(st.floats(0.0, 100.0))

    def losses(order_n, order_m):
        return contrastive_rows(
            rows[order_n], columns[order_m], scale, row_group=row_group[order_n], column_group=column_group[order_m]
        )

    plain = losses(torch.arange(n), torch.arange(m))
    if len(set(column_group.tolist())) == m:
        assert (plain >= -1e-12).all()
    order_n, order_m = (torch.tensor(data.draw(st.permutations(range(size)))) for size in (n, m))
    close(losses(order_n, order_m), plain[order_n], FLOAT64)
    usual = contrastive_tiles.TILE["cpu"]
    try:
        contrastive_tiles.TILE["cpu"] = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
        close(losses(torch.arange(n), torch.arange(m)), plain, FLOAT64)
    finally:
        contrastive_tiles.TILE["cpu"] = usual


def test_the_same_result_twice(backend, device):
    rows, columns = unit(33, 27, 8).float().to(device).requires_grad_(), unit(33, 28, 8).float().to(device)
    runs = []
    for _ in range(2):
        value = contrastive_loss(rows, columns, 20.0, backend=backend)
        runs.append((value.detach(), *torch.autograd.grad(value, rows)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# As a PyTorch operator


def test_opcheck(backend, device):
    rows, columns = unit(5, 29).float().to(device), unit(7, 30).float().to(device)
    scale = torch.tensor(3.0, device=device)
    groups = torch.arange(5, device=device), torch.arange(7, device=device)
    leaves = [tensor.clone().requires_grad_() for tensor in (rows, columns, scale)]
    ops = torch.ops.fastmat
    for flags in ((False, True), (True, True), (False, False)):
        torch.library.opcheck(ops.contrastive_fold.default, (*leaves, *groups, *flags, backend))
    states = torch.rand(3, 5, device=device), torch.rand(3, 7, device=device)
    for values in ((rows, columns), (None, columns), (rows, None)):
        arguments = (rows, columns, scale, *states, *groups, False, *values, scale, torch.float32, backend)
        torch.library.opcheck(ops.contrastive_weigh.default, arguments)
    torch.library.opcheck(ops.contrastive_positive_count.default, (groups[0], groups[1], "a", "b"))


def test_compiles_without_a_break(device):
    given = queued(device, torch.float32)
    inputs = [given.pop("rows").requires_grad_(), given.pop("columns").requires_grad_()]
    inputs.append(torch.tensor(6.0, device=device, requires_grad=True))

    def loss(rows, columns, scale):
        mixed = contrastive_rows(rows, columns, scale, soft_weight=0.4, **given)
        return mixed.sum() + contrastive_loss(rows[:4], columns, scale)

    values = [function(*inputs) for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))]
    plain, compiled = ((value.detach(), *torch.autograd.grad(value, inputs)) for value in values)
    torch.testing.assert_close(compiled, plain)


# Bad input

ROWS, COLUMNS = torch.zeros(3, 4), torch.zeros(5, 4)
IDS = {"row_group": torch.zeros(3, dtype=torch.int64), "column_group": torch.zeros(5, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(4)}, "rows must be"),
        ({"columns": torch.zeros(5, 3)}, "columns must have shape"),
        ({"rows": torch.zeros(3, 4, dtype=torch.int64)}, "rows must be float32"),
        ({"columns": torch.zeros(5, 4, device="meta")}, "columns is on meta"),
        ({"columns": torch.zeros(0, 4), "column_group": IDS["column_group"][:0]}, "columns must have at least one"),
        ({"logit_scale": torch.ones(2)}, "logit_scale must be one"),
        ({"logit_scale": torch.tensor(3)}, "logit_scale must be one real"),
        ({"logit_scale": torch.tensor(1.0, device="meta")}, "logit_scale is on meta"),
        ({"row_group": None}, "row_group must be given with column_group"),
        ({"column_group": None}, "column_group must be given with row_group"),
        ({"row_group": None, "column_group": None}, "row i matches column i, but rows has 3"),
        ({"row_group": IDS["column_group"]}, "row_group must have shape"),
        ({"column_group": torch.zeros(5)}, "column_group must be int64"),
        ({"column_group": IDS["column_group"].to("meta")}, "column_group is on meta"),
        ({"column_group": IDS["column_group"] + 1}, "row_group: no entry of column_group equals entry 0"),
        ({"soft_weight": 0.5}, "soft_weight needs soft_rows"),
        ({"soft_rows": ROWS, "soft_weight": 1.5}, "soft_weight must be in"),
        ({"soft_rows": COLUMNS, "soft_weight": 0.5}, "soft_rows must have shape"),
        ({"soft_rows": ROWS.long(), "soft_weight": 0.5}, "soft_rows must be float32"),
        ({"queue": COLUMNS}, "queue and queue_group must be given together"),
        ({"queue_group": IDS["column_group"]}, "queue and queue_group must be given together"),
        ({"queue": COLUMNS.T, "queue_group": IDS["column_group"]}, "queue must have shape"),
        ({"queue": COLUMNS, "queue_group": IDS["row_group"]}, "queue_group must have shape"),
        ({"backend": "tritn"}, "names no backend"),
    ],
)
def test_bad_input(change, message):
    arguments = {"rows": ROWS, "columns": COLUMNS, "logit_scale": 1.0, **IDS, **change}
    with pytest.raises(ValueError, match=message):
        contrastive_rows(**arguments)


def test_bad_input_of_the_loss_is_named_in_its_words():
    with pytest.raises(ValueError, match="text_features must have shape"):
        contrastive_loss(ROWS, torch.zeros(5, 3), 1.0)
    with pytest.raises(ValueError, match="image_features must have at least one row"):
        contrastive_loss(ROWS[:0], ROWS[:0], 1.0)
    with pytest.raises(ValueError, match="text_group: no entry of image_group equals entry 1"):
        contrastive_loss(ROWS, ROWS[:2], 1.0, image_group=torch.zeros(3).long(), text_group=torch.tensor([0, 4]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu_and_a_row_without_a_positive_adds_nothing():
    rows, columns = unit(6, 31).float().cuda().requires_grad_(), unit(6, 32).float().cuda().requires_grad_()
    groups = torch.arange(6, device="cuda"), torch.tensor([0, 1, 2, 3, 4, 4], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = contrastive_rows(rows, columns, 5.0, row_group=groups[0], column_group=groups[1])
        torch.autograd.grad(value.sum(), (rows, columns))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(value[5]) == 0.0
