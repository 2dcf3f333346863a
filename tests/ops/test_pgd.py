import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmat.ops import pgd_step, project


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 5, 7), (0, 3, 4, 4)])
def test_step_against_float64(norm: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(shape, generator=generator)
    x = (x0 + 0.02 * torch.randn(shape, generator=generator)).clamp(0, 1)
    grad = torch.randn(shape, generator=generator)
    got = pgd_step(x, grad, x0, eps=0.03, step_size=0.01, norm=norm)
    a, g, a0 = x.double(), grad.double(), x0.double()
    if norm == "linf":
        want = torch.minimum(torch.maximum(a + 0.01 * torch.sign(g), a0 - 0.03), a0 + 0.03)
    else:
        flat = [row / row.pow(2).sum().sqrt() for row in g]
        want = a + 0.01 * (torch.stack(flat) if flat else g)
        for i in range(len(want)):
            radius = (want[i] - a0[i]).pow(2).sum().sqrt()
            if radius > 0.03:
                want[i] = a0[i] + (want[i] - a0[i]) * 0.03 / radius
    torch.testing.assert_close(got, want.clamp(0, 1).float(), atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    eps=st.floats(1e-4, 0.5),
    step_size=st.floats(1e-4, 2.0),
    norm=st.sampled_from(["linf", "l2"]),
)
def test_result_is_inside_ball_and_box_and_projection_is_idempotent(seed, eps, step_size, norm) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(2, 3, 4, 4, generator=generator)
    grad = torch.randn(2, 3, 4, 4, generator=generator)
    x = pgd_step(x0, grad, x0, eps=eps, step_size=step_size, norm=norm)
    delta = (x - x0).flatten(1)
    radius = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (radius <= eps + 1e-6).all() and x.min() >= 0 and x.max() <= 1
    torch.testing.assert_close(project(x, x0, eps=eps, norm=norm), x, atol=1e-6, rtol=0)
    assert (delta * grad.flatten(1) >= -1e-9).all(), "a step against the gradient"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradient_stays_in_budget(norm: str, bad: float) -> None:
    x0 = torch.full((2, 3, 2, 2), 0.5)
    grad = torch.ones_like(x0)
    grad[0, 0, 0, 0] = bad
    x = pgd_step(x0, grad, x0, eps=0.1, step_size=0.05, norm=norm)
    assert x.isfinite().all() and ((x - x0).abs() <= 0.1 + 1e-6).all()
    assert (x[1] > x0[1]).all(), "the other image must still move"
    if bad != bad:
        assert x[0, 0, 0, 0] == 0.5, "a NaN moves nothing"
