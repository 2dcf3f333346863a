"""Opponents are re-written operation for operation: they make the kernels and passes of the originals."""

from pathlib import Path

import pytest
import torch

from fastmat.benchmarks.bench_pgd import EPS, STEP, Images
from fastmat.benchmarks.opponents import PUBLISHED, fare, published, torchattacks_mifgsm
from fastmat.benchmarks.passes import Count, count_passes

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PUBLISHED)
def test_opponents_make_the_passes_of_the_originals(name: str) -> None:
    assert count_passes(IMAGES, published(IMAGES)[name]) == PUBLISHED[name]


def test_counts_are_those_of_the_readme() -> None:
    readme = (Path(__file__).parents[2] / "benchmarks/README.md").read_text()
    for name, count in PUBLISHED.items():
        assert f"| {name} | {count.kernels} | {count.passes} |" in readme


def test_what_a_pass_is() -> None:
    x, out = IMAGES, torch.empty_like(IMAGES)
    small = torch.ones(4, 1, 1, 1)
    assert count_passes(x, lambda: x * small) == Count(1, 2)
    assert count_passes(x, lambda: torch.sign(x, out=out)) == Count(1, 2)
    assert count_passes(x, lambda: out.copy_(x)) == Count(1, 2)
    assert count_passes(x, lambda: out.add_(x)) == Count(1, 3)
    assert count_passes(x, lambda: out.zero_()) == Count(1, 1)
    assert count_passes(x, lambda: x.isnan()) == Count(1, 1.25)
    assert count_passes(x, lambda: x.view(4, -1).detach()) == Count(0, 0)
    assert count_passes(x, lambda: torch.zeros_like(x)) == Count(1, 1)
    assert count_passes(x, lambda: x.half()) == Count(1, 1.5)
    assert count_passes(x, lambda: bool(x[0].sum() > 0)) == Count(2, 0)
    assert count_passes(x, lambda: torch.stack([x, x])) == Count(1, 4)


def test_fare_checks_what_the_original_checks() -> None:
    images = Images(2, 8, torch.device("cpu"))
    outside = images.x0 + 2  # clean pixels outside the box
    with pytest.raises(AssertionError):
        fare(torch.full_like(outside, torch.nan), images.velocity, images.grad, outside, EPS, STEP, 0.9)
    holes = images.grad.clone()
    holes[0, 0, 0, 0] = torch.nan
    delta, _ = fare(images.x - images.x0, images.velocity, holes, images.x0, EPS, STEP, 0.0)
    assert delta.isfinite().all()


def test_momentum_is_kept() -> None:
    images = Images(2, 8, torch.device("cpu"))
    _, velocity = torchattacks_mifgsm(images.x, images.velocity, images.grad, images.x0, EPS, STEP, 0.5)
    mean = images.grad.abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(velocity, images.grad / mean + 0.5 * images.velocity)
