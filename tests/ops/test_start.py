import math

import pytest
import torch

from fastmat.ops import normal_noise, random_start, uniform_noise
from fastmat.ops.start import start_op

INDEX = torch.tensor([4, 0, 2**40])


def images(shape=(3, 3, 5, 7)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_against_the_formula(norm, each, as_bytes, backend, device) -> None:
    x0 = images().to(device)
    pixels = (x0 * 255).to(torch.uint8) if as_bytes else x0
    clean = pixels.double() / 255 if as_bytes else x0.double()
    eps = torch.tensor([0.1, 0.2, 0.0], device=device) if each else 0.1
    got = random_start(pixels, eps=eps, norm=norm, seed=9, index=INDEX.to(device), backend=backend)
    size = torch.as_tensor(eps, device=device).double().expand(3).view(3, 1, 1, 1)
    if norm == "linf":
        delta = uniform_noise(9, INDEX.to(device), (3, 5, 7)).double()
        torch.testing.assert_close(got, (clean + size * delta).clip(0, 1).float(), atol=1e-6, rtol=0)
    else:
        z = normal_noise(9, INDEX.to(device), (3, 5, 7)).double()
        unbounded = random_start(
            pixels, eps=eps, norm=norm, bounds=(-9, 9), seed=9, index=INDEX.to(device), backend=backend
        ).double()
        length = (unbounded - clean).flatten(1).norm(dim=1)
        along = (z / z.flatten(1).norm(dim=1).view(-1, 1, 1, 1)) * length.view(-1, 1, 1, 1)
        torch.testing.assert_close(unbounded, clean + along, atol=1e-6, rtol=0)
        assert (length <= size.flatten() + 1e-6).all() and (length[:2] > 0).all()
        torch.testing.assert_close(got, unbounded.clip(0, 1).float(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 4, 4), (2, 5003), (0, 3, 4, 4), (2, 0)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_backends_agree(norm, shape, device) -> None:
    x0 = images(shape).to(device)
    reference, kernel = (random_start(x0, eps=0.3, norm=norm, seed=1, backend=b) for b in ("reference", "triton"))
    exact = norm == "linf" and device.type == "cpu"
    torch.testing.assert_close(kernel, reference, atol=0 if exact else 1e-6, rtol=0)
    assert reference.shape == shape and reference.isfinite().all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_any_block_size(norm, device) -> None:
    kernels = pytest.importorskip("fastmat.kernels.start")
    x0, results = images().to(device).view(3, -1), []
    for block in (16, 512):
        out = torch.full_like(x0, math.nan)
        kernels.launch_start(
            out, x0, eps=0.1, norm=norm, low=0.0, high=1.0, seed=3, index=INDEX.to(device), draw=None, radius=None,
            block=block,
        )  # fmt: skip
        results.append(out)
    torch.testing.assert_close(*results, atol=1e-7, rtol=0)


def test_given_draws_take_the_place_of_the_seed(backend, device) -> None:
    x0 = images().to(device)
    uniform = uniform_noise(0, torch.arange(3, device=device), x0.shape[1:])
    seeded = random_start(x0, eps=0.1, seed=0, backend=backend)
    assert torch.equal(random_start(x0, eps=0.1, draw=uniform, backend=backend), seeded)
    draw, radius = images().to(device) - 0.5, torch.tensor([0.0, 0.5, 1.0], device=device)
    got = random_start(x0, eps=2.0, norm="l2", bounds=(-9, 9), draw=draw, radius=radius, backend=backend)
    want = x0 + 2 * radius.view(-1, 1, 1, 1) * draw / draw.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("factor", [1e30, 1e-25])
def test_the_length_of_given_draws_neither_overflows_nor_vanishes(factor, backend, device) -> None:
    x0, draw = images().to(device), images().to(device) - 0.5
    options = {"eps": 0.5, "norm": "l2", "radius": torch.ones(3, device=device), "backend": backend}
    want = random_start(x0, draw=draw, **options)
    torch.testing.assert_close(random_start(x0, draw=draw * factor, **options), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("launcher", ["fastmat.kernels.start.launch_start", "fastmat.ops.start.start_reference"])
def test_a_negative_eps_that_nobody_saw_counts_as_zero(launcher, device) -> None:
    """As on CUDA, where values of tensors are not checked."""
    module, name = launcher.rsplit(".", 1)
    x0 = images().to(device).view(3, -1)
    out, eps = torch.empty_like(x0), torch.tensor([-1.0, 0.1, 0.0], device=device)
    settings = {"norm": "linf", "low": 0.0, "high": 1.0, "seed": 3, "index": INDEX.to(device)}
    getattr(pytest.importorskip(module), name)(out, x0, eps=eps, draw=None, radius=None, **settings)
    assert torch.equal(out[::2], x0[::2]) and not torch.equal(out[1], x0[1])


def test_radius_is_uniform() -> None:
    n = 4000
    x = random_start(torch.zeros(n, 8), eps=1.0, norm="l2", bounds=(-9, 9), seed=0)
    radius = x.norm(dim=1).sort().values
    assert (radius - (torch.arange(n) + 0.5) / n).abs().max() < 1.63 / n**0.5, "Kolmogorov-Smirnov, 1 %"


def test_independent_of_the_batch(backend) -> None:
    x0 = images()
    whole = random_start(x0, eps=0.1, norm="l2", seed=2, index=INDEX, backend=backend)
    assert torch.equal(random_start(x0[1:], eps=0.1, norm="l2", seed=2, index=INDEX[1:], backend=backend), whole[1:])


def test_operator(device) -> None:
    x0 = images().to(device)
    index, each = torch.arange(3, device=device), torch.full((3,), 0.1, device=device)
    torch.library.opcheck(start_op, (x0, index, None, None, each, 0.0, "l2", 0.0, 1.0, 5, ""))
    torch.library.opcheck(start_op, (x0, index, x0, None, None, 0.1, "linf", 0.0, 1.0, 0, ""))
    compiled = torch.compile(lambda x: random_start(x, eps=0.1, seed=5) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x0), random_start(x0, eps=0.1, seed=5) * 2)


def test_bad_input() -> None:
    x0 = images()

    def fails(match: str, *arguments, **options) -> None:
        with pytest.raises(ValueError, match=match):
            random_start(*arguments, **({"eps": 0.1, "seed": 0} | options))

    fails("either seed or draw", x0, draw=x0)
    fails("either seed or draw", x0, seed=None)
    fails("radius belongs to draw", x0, radius=torch.ones(3))
    fails("radius belongs to draw", x0, seed=None, draw=x0, norm="l2")
    fails("x0 must be float32 or uint8", x0.long())
    fails("first dimension", x0[0, 0, 0, 0])
    fails("norm must be", x0, norm="l0")
    fails("bounds must be", x0, bounds=(1, 0))
    fails("eps must be at least 0", x0, eps=-1)
    fails("eps must be at least 0 and finite for every image", x0, eps=torch.tensor([0.1, -1, 0.1]))
    fails("index must have shape", x0, index=torch.arange(2))
    fails("index must be int64", x0, index=torch.arange(3.0))
    fails("index is on meta", x0, index=torch.arange(3, device="meta"))
    fails("draw must have shape", x0, seed=None, draw=x0[:2])
    fails("draw must be float32", x0, seed=None, draw=x0.half())
    fails("radius must have shape", x0, seed=None, draw=x0, norm="l2", radius=torch.ones(2))
