"""Static corrections against plain loops; folded ones against themselves."""

import numpy as np
import pytest
import torch
from torch import nn

from fastmat.alignment.pairs import Pairs
from fastmat.alignment.static import Affine, Subspace, fit_affine, fit_subspace, folded, shift_basis
from fastmat.errors import UserError


def pairs(n: int = 40, channels: int = 6, tokens: int | None = None) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    shape = (n, channels) if tokens is None else (n, tokens, channels)
    clean = torch.randn(shape, generator=generator) + torch.arange(channels)
    adversarial = 1.7 * clean + 0.4 * torch.randn(shape, generator=generator) - 0.9
    return Pairs(site="image" if tokens is None else "tokens", clean=clean, adversarial=adversarial)


@pytest.mark.parametrize("tokens", [None, 3])
def test_estimates_by_loops(tokens: int | None) -> None:
    found = pairs(tokens=tokens)
    a, b = (features.numpy().astype(float) for features in found.flat())
    for c in range(6):
        slope, start = np.polyfit(b[:, c], a[:, c], 1)
        ratio = a[:, c].std() / (b[:, c].std() + 1e-6)
        expected = {
            "mean": (1, a[:, c].mean() - b[:, c].mean()),
            "mean_variance": (ratio, a[:, c].mean() - ratio * b[:, c].mean()),
            "least_squares": (slope, start),
        }
        for method, (scale, shift) in expected.items():
            made = fit_affine(found, method=method)  # type: ignore[arg-type]
            assert (float(made.scale[c]), float(made.shift[c])) == pytest.approx((scale, shift), rel=1e-4, abs=1e-5)


def test_what_each_restores() -> None:
    found = pairs()
    clean, adversarial = found.flat()
    for method in ("mean", "mean_variance", "least_squares"):
        assert torch.allclose(fit_affine(found, method=method)(adversarial).mean(0), clean.mean(0), atol=1e-4)
    matched = fit_affine(found, method="mean_variance")(adversarial)
    assert torch.allclose(matched.std(0), clean.std(0), atol=1e-3)
    made = [fit_affine(found, method=method)(adversarial) for method in ("mean", "mean_variance", "least_squares")]
    distances = [float((z - clean).square().sum()) for z in made]
    assert distances[2] == min(distances) < distances[0]


def test_shrinkage() -> None:
    found = pairs()
    whole, half, none = (fit_affine(found, method="least_squares", shrinkage=rho) for rho in (0.0, 0.5, 1.0))
    z = found.adversarial
    assert torch.equal(none(z), z)
    assert torch.allclose(half(z), (whole(z) + z) / 2, atol=1e-5)
    with pytest.raises(UserError, match=r"shrinkage must be in \[0, 1\], got 2"):
        fit_affine(found, method="mean", shrinkage=2)


def test_a_constant_channel_is_left() -> None:
    clean = torch.randn(9, 2)
    adversarial = torch.cat([torch.full((9, 1), 3.0), clean[:, 1:] + 1], 1)
    made = fit_affine(Pairs(site="image", clean=clean, adversarial=adversarial), method="least_squares")
    assert float(made.scale[0]) == 1 and torch.isfinite(made.shift).all()


def test_a_subspace() -> None:
    found = pairs()
    basis = shift_basis(found, rank=2)
    assert torch.allclose(basis.T @ basis, torch.eye(2), atol=1e-5)
    shift = (found.adversarial - found.clean).numpy()
    _, _, rows = np.linalg.svd(shift, full_matrices=False)
    inside = torch.tensor(rows[:2].T @ rows[:2])
    assert torch.allclose(basis @ basis.T, inside, atol=1e-4)
    made = fit_subspace(found, rank=2)
    z = found.adversarial
    assert torch.allclose((made(z) - found.clean.mean(0)) @ basis, torch.zeros(40, 2), atol=1e-4)
    outside = torch.eye(6) - inside
    assert torch.allclose(made(z) @ outside, z @ outside, atol=1e-4)
    with pytest.raises(UserError, match="rank must be between 1 and the 6 channels, got 7"):
        shift_basis(found, rank=7)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["affine", "subspace"])
def test_folded_is_the_same_map(kind: str, bias: bool) -> None:
    found = pairs()
    correction: Affine | Subspace
    correction = fit_affine(found, method="least_squares") if kind == "affine" else fit_subspace(found, rank=2)
    projection = nn.Linear(11, 6, bias=bias)
    x = torch.randn(5, 11)
    made = folded(projection, correction)
    assert type(made) is nn.Linear
    assert torch.allclose(made(x), correction(projection(x)), atol=1e-5)
    with pytest.raises(UserError, match="for 6 channels, the projection gives 4"):
        folded(nn.Linear(11, 4), correction)
