import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmat.ops import apgd_step, momentum_step, pgd_step, project
from fastmat.ops import pgd_reference as module
from fastmat.ops.pgd import pgd_update
from fastmat.ops.pgd_reference import blocks

SHAPES = [(1, 1), (1, 3, 1, 1), (2, 3, 5, 7), (3, 4095), (2, 4097), (0, 3, 4, 4), (2, 3, 0, 4)]
KINDS = ["pgd", "mi", "fare", "apgd"]
EPS, STEP = {"linf": 0.03, "l2": 0.5}, {"linf": 0.01, "l2": 0.2}


def inputs(shape: tuple[int, ...], device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(shape, generator=generator)
    x = (x0 + 0.02 * torch.randn(shape, generator=generator)).clamp(0, 1)
    tensors = {
        "x0": x0,
        "x": x,
        "grad": torch.randn(shape, generator=generator),
        "state": torch.where(torch.rand(shape, generator=generator) < 0.5, x0, x),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def step(kind: str, x: Tensor, state: Tensor, grad: Tensor, x0: Tensor, **options) -> Tensor:
    if kind == "pgd":
        return pgd_step(x, grad, x0, **options)
    if kind == "apgd":
        return apgd_step(x, state, grad, x0, inertia=0.75, **options)
    return momentum_step(x, state, grad, x0, decay=0.9, rule=kind, **options)


def float64_step(kind, x, state, grad, x0, eps, step_size, norm) -> tuple[Tensor, Tensor]:
    """(result, new state), image by image, from the formulas."""

    def unit(v):
        if norm == "linf":
            return torch.sign(v)
        return v / v.square().sum().sqrt() if v.any() else v

    def inside(v, center, radius):
        delta = v - center
        if norm == "linf":
            delta = torch.minimum(torch.maximum(delta, -radius), radius)
        elif (length := delta.square().sum().sqrt()) > radius:
            delta = delta * radius / length
        return (center + delta).clip(0, 1)

    results, states = [], []
    for i in range(len(x)):
        a, s, g, c = (t[i].double() for t in (x, state, grad, x0))
        radius, size = (torch.as_tensor(v, dtype=torch.float64).expand(len(x))[i] for v in (eps, step_size))
        if kind == "mi":
            s = 0.9 * s + g / g.abs().mean()
        elif kind == "fare":
            s = unit(0.9 * s + unit(g))
        z = inside(a + size * unit(g if kind in ("pgd", "apgd") else s), c, radius)
        if kind == "apgd":
            z, s = inside(a + 0.75 * (z - a) + 0.25 * (a - s), c, radius), a
        results.append(z)
        states.append(s)
    return torch.stack(results).float(), torch.stack(states).float()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, kind, norm, backend, device) -> None:
    t = inputs(shape, device)
    got = step(
        kind,
        **t | {"state": (state := t["state"].clone())},
        eps=EPS[norm],
        step_size=STEP[norm],
        norm=norm,
        backend=backend,
    )
    assert got.shape == shape and got.dtype == torch.float32
    if not got.numel():
        return
    want, want_state = float64_step(kind, **t, eps=EPS[norm], step_size=STEP[norm], norm=norm)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    if kind != "pgd":
        torch.testing.assert_close(state, want_state, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_per_image_and_byte_images(kind, norm, backend, device) -> None:
    t = inputs((3, 3, 5, 7), device)
    pixels = (t["x0"] * 255).round().to(torch.uint8)
    eps = torch.tensor([0.3, 1.0, 2.0], device=device) * EPS[norm]
    size = torch.tensor([0.0, 1.0, 3.0], device=device) * STEP[norm]
    state = t["state"].clone()
    got = step(kind, t["x"], state, t["grad"], pixels, eps=eps, step_size=size, norm=norm, backend=backend)
    t["x0"] = pixels / 255
    want, _ = float64_step(kind, **t, eps=eps, step_size=size, norm=norm)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_are_read_as_they_are(dtype, norm, backend, device) -> None:
    t = inputs((2, 3, 5, 7), device)
    half = t["grad"].to(dtype)
    options = {"eps": EPS[norm], "step_size": STEP[norm], "norm": norm}
    got = pgd_step(t["x"], half, t["x0"], **options, backend=backend)
    torch.testing.assert_close(got, pgd_step(t["x"], half.float(), t["x0"], **options), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_backends_are_equal_to_the_bit_in_linf(kind, device) -> None:
    results = []
    for backend in ("reference", "triton"):
        t = inputs((2, 3, 9, 11), device)
        out = step(kind, **t, eps=0.03, step_size=0.01, backend=backend)
        results.append((out, t["state"]))
    for reference, kernel in zip(*results, strict=True):
        # A GPU sums the mean of mi in another order.
        torch.testing.assert_close(kernel, reference, atol=0 if device.type == "cpu" else 1e-7, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [16, 64, 1024])
def test_any_block_size(block, kind, norm, device) -> None:
    triton_pgd = pytest.importorskip("fastmat.kernels.pgd")
    results = []
    for size in (block, 4096):
        t = {name: tensor.view(2, -1) for name, tensor in inputs((2, 3, 5, 7), device).items()}
        state = t.pop("state")
        named = {"pgd": {}, "apgd": {"previous": state, "inertia": 0.75}}.get(
            kind, {"velocity": state, "decay": 0.9, "rule": kind}
        )
        out = torch.full_like(t["x"], math.nan)
        triton_pgd.launch_pgd_update(
            out, **t, **named, eps=EPS[norm], step_size=STEP[norm], norm=norm, low=0.0, high=1.0, block=size
        )
        results.append((out, state))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_out_and_non_contiguous(kind, backend, device) -> None:
    t = inputs((2, 3, 6, 5), device)
    options = {"eps": 0.03, "step_size": 0.01, "backend": backend}
    want_state = t["state"].clone()
    want = step(kind, t["x"], want_state, t["grad"], t["x0"], **options)
    strided = {name: tensor.transpose(2, 3).contiguous().transpose(2, 3) for name, tensor in t.items()}
    assert not strided["x"].is_contiguous()
    assert torch.equal(step(kind, **{name: tensor.clone() for name, tensor in strided.items()}, **options), want)
    returned = step(kind, **strided, **options, out=strided["x"])
    assert returned is strided["x"] and torch.equal(returned, want)
    if kind != "pgd":
        assert torch.equal(strided["state"], want_state)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    eps=st.floats(1e-4, 0.5),
    size=st.floats(0, 2.0),
    norm=st.sampled_from(["linf", "l2"]),
    kind=st.sampled_from(KINDS),
    poison=st.sampled_from([0.0, math.nan, math.inf, -math.inf, 1e30, 1e-25]),
    bounds=st.sampled_from([(0.0, 1.0), (0.25, 0.5)]),
)
def test_inside_ball_and_box_idempotent_and_sign_symmetric(seed, eps, size, norm, kind, poison, bounds) -> None:
    t = inputs((2, 3, 4, 4), seed=seed)
    t = {name: tensor if name == "grad" else tensor.clamp(*bounds) for name, tensor in t.items()}
    t["grad"].view(-1)[seed % 96] = poison
    x = step(kind, **t, eps=eps, step_size=size, norm=norm, bounds=bounds)
    delta = (x - t["x0"]).flatten(1)
    radius = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert x.isfinite().all() and (radius <= eps + 1e-6).all() and x.min() >= bounds[0] and x.max() <= bounds[1]
    torch.testing.assert_close(project(x, t["x0"], eps=eps, norm=norm, bounds=bounds), x, atol=1e-6, rtol=0)
    # Mirrored in 1/2, every image, gradient and state gives the mirrored step.
    t = inputs((2, 3, 4, 4), seed=seed)
    mirrored = {name: -tensor if name == "grad" else 1 - tensor for name, tensor in t.items()}
    if kind in ("mi", "fare"):
        mirrored["state"] = -t["state"]
    options = {"eps": eps, "step_size": size, "norm": norm}
    torch.testing.assert_close(step(kind, **mirrored, **options), 1 - step(kind, **t, **options), atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite(bad, kind, norm, backend, device) -> None:
    """Linf: a NaN has sign 0, an infinity its sign. Where the image is normalised, it adds nothing. Others move on."""
    x0 = torch.full((2, 3, 2, 2), 0.5, device=device)
    grad = torch.ones_like(x0)
    grad[0, 0, 0, 0] = bad
    state = {"apgd": x0.clone()}.get(kind, torch.zeros_like(x0))
    x = step(kind, x0, state, grad, x0, eps=0.1, step_size=0.05, norm=norm, backend=backend)
    assert state.isfinite().all(), "the state is not poisoned"
    assert (x[1] > 0.5).all()
    if norm == "l2" or kind == "mi":
        assert (x[0] == 0.5).all()
    else:
        assert (x[0].flatten()[1:] > 0.5).all()
        assert float(x[0, 0, 0, 0] - 0.5) * (0 if math.isnan(bad) else bad) >= 0
        assert (x[0, 0, 0, 0] == 0.5) == math.isnan(bad)


@pytest.mark.parametrize("factor", [1e30, 1e-25])
def test_lengths_neither_overflow_nor_vanish(factor, backend, device) -> None:
    t = inputs((2, 3, 5, 7), device)
    options = {"eps": 0.5, "step_size": 0.2, "norm": "l2", "backend": backend}
    want = pgd_step(t["x"], t["grad"], t["x0"], **options)
    got = pgd_step(t["x"], t["grad"] * factor, t["x0"], **options)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    still = pgd_step(t["x"], t["grad"] * 0, t["x0"], **options)
    torch.testing.assert_close(still, project(t["x"], t["x0"], eps=0.5, norm="l2"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["pgd", "mi", "fare"])
@pytest.mark.parametrize("value", [1e-33, 3.2e38, math.nan])
def test_a_length_of_no_use_still_projects(value, kind, backend, device) -> None:
    """Below 1e-30, above what fp32 holds, or NaN: no step, but an image outside the ball comes back into it."""
    x0 = torch.full((2, 3, 5, 7), 0.5, device=device)
    x, state = x0 + inputs(x0.shape, device)["x"] - 0.5, torch.zeros_like(x0)
    got = step(kind, x, state, torch.full_like(x0, value), x0, eps=0.3, step_size=0.2, norm="l2", backend=backend)
    assert (x - x0).flatten(1).norm(dim=1).min() > 1
    torch.testing.assert_close(got, project(x, x0, eps=0.3, norm="l2"), atol=1e-6, rtol=0)
    assert not state.any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree_in_a_box_without_zero_and_from_outside_it(kind, norm, device) -> None:
    results = []
    for backend in ("reference", "triton"):
        t = inputs((2, 3, 5, 7), device)
        options = {"eps": 0.1, "step_size": STEP[norm], "norm": norm, "bounds": (0.3, 0.6), "backend": backend}
        results.append((step(kind, **t, **options), t["state"]))
    for reference, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, reference, atol=1e-6, rtol=1e-6)


def test_where_nobody_checks_a_negative_or_nan_size_counts_as_zero(device) -> None:
    """On a GPU the values of tensors are not looked at."""
    kernels = pytest.importorskip("fastmat.kernels.pgd")
    x, grad, x0 = (inputs((3, 105), device)[name] for name in ("x", "grad", "x0"))
    bad, good = torch.tensor([-0.1, math.nan, 0.1], device=device), torch.tensor([0.0, 0.0, 0.1], device=device)
    for sizes in ({"eps": bad, "step_size": 0.1}, {"eps": 0.1, "step_size": bad}):
        out, want = torch.full_like(x, math.nan), torch.empty_like(x)
        kernels.launch_pgd_update(out, x, grad, x0, norm="linf", low=0.0, high=1.0, **sizes)
        sizes = {name: good if value is bad else value for name, value in sizes.items()}
        kernels.launch_pgd_update(want, x, grad, x0, norm="linf", low=0.0, high=1.0, **sizes)
        assert torch.equal(out, want)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_gives_the_same_in_blocks_of_any_size(kind, norm, monkeypatch) -> None:
    """Also where an image is more than a block: lengths and means are of whole images."""
    results = []
    for chunk in (module.CHUNK, 16, 250):
        monkeypatch.setattr(module, "CHUNK", chunk)
        t = inputs((3, 3, 5, 7))
        each = torch.tensor([0.5, 1.0, 2.0])
        sizes = {"eps": each * EPS[norm], "step_size": each * STEP[norm]}
        results.append((step(kind, **t, **sizes, norm=norm, backend="reference"), t["state"]))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-6)


def test_the_two_loops_of_the_readme_give_the_same_images() -> None:
    section = (Path(__file__).parents[2] / "README.md").read_text().split("## The operators alone")[1]
    made: list[dict] = []
    for code in re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)[:2]:
        names: dict = {}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            exec(code, names)
        made.append(names)
    plain, fused = made
    assert "pgd_step" in fused and "pgd_step" not in plain
    assert torch.equal(plain["x0"], fused["x0"]) and not torch.equal(plain["x"], plain["x0"])
    torch.testing.assert_close(fused["x"], plain["x"], atol=1e-6, rtol=0)


def test_projection_of_zero_radius_and_open_box(backend) -> None:
    t = inputs((2, 3, 4, 4))
    assert torch.equal(project(t["x"], t["x0"], eps=0.0, backend=backend), t["x0"])
    assert torch.equal(project(t["x"], t["x0"], eps=0.0, norm="l2", backend=backend), t["x0"])
    for norm in ("linf", "l2"):
        got = project(t["x"], t["x0"], eps=torch.tensor([0.0, 9.0]), norm=norm, backend=backend)
        assert torch.equal(got[0], t["x0"][0])
        torch.testing.assert_close(got[1], t["x"][1], atol=1e-7, rtol=0)
    free = pgd_step(t["x0"], t["grad"], t["x0"], eps=3.0, step_size=2.0, bounds=(-math.inf, math.inf), backend=backend)
    torch.testing.assert_close(free, t["x0"] + 2 * t["grad"].sign(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("launcher", ["fastmat.kernels.pgd.launch_pgd_update", "fastmat.ops.pgd.pgd_update_reference"])
def test_a_negative_size_that_nobody_saw_counts_as_zero(launcher, norm, device) -> None:
    """As on CUDA, where values of tensors are not checked."""
    module, name = launcher.rsplit(".", 1)
    t = {name: tensor.view(2, -1) for name, tensor in inputs((2, 3, 4, 4), device).items() if name != "state"}
    box = {"norm": norm, "low": 0.0, "high": 1.0}
    results = []
    for low in (0.0, -1.0):
        out = torch.empty_like(t["x"])
        sizes = {"eps": torch.tensor([low, 0.5], device=device), "step_size": torch.tensor([0.2, low], device=device)}
        getattr(pytest.importorskip(module), name)(out, **t, **sizes, **box)
        results.append(out)
    assert torch.equal(*results) and torch.equal(results[0][0], t["x0"][0])


def test_what_is_written_shares_no_memory(backend) -> None:
    t = inputs((2, 3, 4, 4))
    x, grad, x0, state = t["x"], t["grad"], t["x0"], t["state"]
    sizes, before = {"eps": 0.1, "step_size": 0.1, "backend": backend}, x.clone()
    with pytest.raises(ValueError, match=r"^previous and out .* must not share memory$"):
        apgd_step(x, x, grad, x0, **sizes, out=x)
    with pytest.raises(ValueError, match=r"^velocity and out .* must not share memory$"):
        momentum_step(x, state, grad, x0, decay=0.9, **sizes, out=state.view(state.shape))
    for name in ("out", "velocity"):
        written = {"velocity": state, "out": state.clone()} | {name: state[:1].expand(state.shape)}
        with pytest.raises(ValueError, match=f"^{name} is written and must not be expanded"):
            momentum_step(x, grad=grad, x0=x0, decay=0.9, **written, **sizes)
    assert torch.equal(x, before) and torch.equal(state, inputs((2, 3, 4, 4))["state"])
    # The first step of APGD has no iterate before x.
    assert torch.equal(
        apgd_step(x, x, grad, x0, inertia=1.0, **sizes), apgd_step(x, x.clone(), grad, x0, inertia=1.0, **sizes)
    )


def test_the_reference_works_in_blocks_that_tile_the_images() -> None:
    for shape in ((3, 200_000), (700, 300), (1, 1)):
        seen = torch.zeros(shape, dtype=torch.int8)
        for part in blocks(seen, whole_images=False):
            assert seen[part].numel() <= 1 << 17
            seen[part] += 1
        assert (seen == 1).all()
    assert all(columns == slice(0, 200_000) for _, columns in blocks(torch.zeros(2, 200_000), whole_images=True))


def test_operator(device) -> None:
    t = inputs((2, 3, 4, 4), device)
    out, each = torch.empty_like(t["x"]), torch.full((2,), 0.1, device=device)
    tail = (0.1, 0.1, "l2", 0.0, 1.0, 0.9)
    images = (t["x"], t["grad"], t["x0"])
    torch.library.opcheck(pgd_update, (out, None, None, *images, None, each, *tail, "", 1.0, ""))
    torch.library.opcheck(pgd_update, (out, t["state"], None, *images, each, None, *tail, "mi", 1.0, ""))
    torch.library.opcheck(pgd_update, (out, None, t["state"], *images, None, None, *tail, "", 0.75, ""))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_breaks(kind, device) -> None:
    def attack(x, state, grad, x0):
        x = step(kind, x, state, grad, x0, eps=0.03, step_size=0.01)
        return step(kind, x, state, grad * x, x0, eps=0.03, step_size=0.01, out=x)

    want, got = inputs((2, 3, 4, 4), device), inputs((2, 3, 4, 4), device)
    compiled = torch.compile(attack, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**got), attack(**want))
    assert torch.equal(got["state"], want["state"])


def test_gradients_stay_outside(backend) -> None:
    t = inputs((2, 3, 4, 4))
    x = t["x"].requires_grad_(True)
    assert not pgd_step(x, t["grad"], t["x0"], eps=0.1, step_size=0.1, backend=backend).requires_grad
    assert pgd_step(x, t["grad"], t["x0"], eps=0.1, step_size=0.1, out=x, backend=backend) is x


def test_bad_input() -> None:
    t = inputs((2, 3, 4, 4))
    x, grad, x0, state = t["x"], t["grad"], t["x0"], t["state"]
    before = {name: tensor.clone() for name, tensor in t.items()}

    def fails(match: str, call, *arguments, **options) -> None:
        with pytest.raises(ValueError, match=match):
            call(*arguments, **({"eps": 0.1, "step_size": 0.1} | options))

    fails("x must be float32", pgd_step, x.to(torch.uint8), grad, x0)
    fails("x must be float32", pgd_step, x.double(), grad, x0)
    fails("grad must be float32 or float16 or bfloat16", pgd_step, x, grad.long(), x0)
    fails("x0 must be float32 or uint8", pgd_step, x, grad, x0.half())
    fails("out must be float32", pgd_step, x, grad, x0, out=x.half())
    fails("velocity must be float32", momentum_step, x, state.half(), grad, x0, decay=0.9)
    fails(r"grad must have shape \(2, 3, 4, 4\) \(of x\), got \(2, 3, 4\)", pgd_step, x, grad[..., 0], x0)
    fails("x0 must have shape", pgd_step, x, grad, x0[:1])
    fails("previous must have shape", apgd_step, x, state[:1], grad, x0)
    fails("grad is on meta", pgd_step, x, grad.to("meta"), x0)
    fails("eps is on meta", pgd_step, x, grad, x0, eps=torch.ones(2, device="meta"))
    fails("first dimension", pgd_step, x[0, 0, 0, 0], grad[0, 0, 0, 0], x0[0, 0, 0, 0])
    fails("norm must be 'linf' or 'l2'", pgd_step, x, grad, x0, norm="l1")
    for eps in (0.0, -0.1, math.nan, math.inf):
        fails("eps must be positive and finite", pgd_step, x, grad, x0, eps=eps)
    fails("eps must be positive and finite for every image", pgd_step, x, grad, x0, eps=torch.tensor([0.1, 0.0]))
    fails("eps must have shape", pgd_step, x, grad, x0, eps=torch.ones(3))
    fails("eps must be float32", pgd_step, x, grad, x0, eps=torch.ones(2, dtype=torch.int64))
    fails("step_size must be at least 0", pgd_step, x, grad, x0, step_size=-0.1)
    fails("step_size must be at least 0", pgd_step, x, grad, x0, step_size=torch.tensor([0.1, -0.1]))
    fails("bounds must be", pgd_step, x, grad, x0, bounds=(1.0, 0.0))
    fails("rule must be 'mi' or 'fare'", momentum_step, x, state, grad, x0, decay=0.9, rule="nesterov")
    fails("decay must be at least 0", momentum_step, x, state, grad, x0, decay=-0.1)
    fails("inertia must lie in", apgd_step, x, state, grad, x0, inertia=1.5)
    with pytest.raises(ValueError, match="eps must be at least 0 and finite"):
        project(x, x0, eps=-1.0)
    assert all(torch.equal(t[name], before[name]) for name in t), "nothing was computed"
