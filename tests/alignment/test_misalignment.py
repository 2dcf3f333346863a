"""Measures of misalignment against plain loops, and against what they must say of shifts made by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr, wasserstein_distance

from fastmat.alignment.misalignment import (
    activation_frequency,
    explained_by_affine,
    explained_by_shift,
    mean_shift,
    measure,
    rank_correlation,
    shift_interval,
    uniformity,
    wasserstein,
)


def features(n: int = 23, channels: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(n, channels, generator=generator, dtype=torch.float64)
    return clean, 0.7 * clean + 0.5 * torch.randn(n, channels, generator=generator, dtype=torch.float64) + 0.3


def test_by_loops() -> None:
    clean, adversarial = features()
    a, b = clean.numpy(), adversarial.numpy()
    for c in range(a.shape[1]):
        assert float(mean_shift(clean, adversarial)[c]) == pytest.approx(
            abs(b[:, c].mean() - a[:, c].mean()) / a[:, c].std()
        )
        expected = wasserstein_distance(a[:, c], b[:, c]) / a[:, c].std()
        assert float(wasserstein(clean, adversarial)[c]) == pytest.approx(expected)
        active = sum(row[c] > 0.01 * row.max() for row in a) / len(a)
        assert float(activation_frequency(clean)[c]) == pytest.approx(active)
    constant = (b - a).mean(0)
    total = sum(float(((y - x) ** 2).sum()) for x, y in zip(a, b, strict=True))
    left = sum(float(((y - constant - x) ** 2).sum()) for x, y in zip(a, b, strict=True))
    assert explained_by_shift(clean, adversarial) == pytest.approx(1 - left / total)
    left = 0.0
    for c in range(a.shape[1]):
        slope, start = np.polyfit(b[:, c], a[:, c], 1)
        left += float(((slope * b[:, c] + start - a[:, c]) ** 2).sum())
    assert explained_by_affine(clean, adversarial) == pytest.approx(1 - left / total)


def test_uniformity_and_order() -> None:
    frequency = torch.tensor([0.2, 0.0, 0.6, 0.2])
    expected = -sum(p * math.log(p) for p in (0.2, 0.6, 0.2)) / math.log(4)
    assert uniformity(frequency) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(uniformity(torch.zeros(3))) and math.isnan(uniformity(torch.ones(1)))
    a, b = torch.tensor([3.0, 1.0, 1.0, 2.0, 5.0]), torch.tensor([1.0, 1.0, 0.0, 7.0, 6.0])
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a.numpy(), b.numpy()).statistic)
    assert math.isnan(rank_correlation(a, torch.ones(5)))


def test_what_must_be() -> None:
    clean, _ = features()
    assert explained_by_shift(clean, clean + torch.arange(7)) == pytest.approx(1)
    # A shift that averages to nothing is not explained by a constant, and one by scale is by an affine map alone.
    signs = torch.tensor([1.0, -1.0]).repeat(12)[:22, None].double()
    assert explained_by_shift(clean[:22], clean[:22] + signs) == pytest.approx(0, abs=1e-12)
    centred = clean - clean.mean(0)
    assert explained_by_shift(centred, 3 * centred) == pytest.approx(0, abs=1e-12)
    assert explained_by_affine(centred, 3 * centred) == pytest.approx(1)
    assert math.isnan(explained_by_shift(clean, clean))
    assert (wasserstein(clean, clean.flip(0)) == 0).all(), "pairing plays no part"


def test_the_interval_by_loops() -> None:
    clean, adversarial = features()
    value, low, high = shift_interval(clean, adversarial)
    kept = [[i for i in range(23) if i != left] for left in range(23)]
    shares = np.array([explained_by_shift(clean[rows], adversarial[rows]) for rows in kept])
    error = math.sqrt(22 / 23 * ((shares - shares.mean()) ** 2).sum())
    assert value == explained_by_shift(clean, adversarial)
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error))


def test_the_interval_covers() -> None:
    """Of many draws from one distribution, about 95 % of the intervals hold what all rows together say."""
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(200 * 100, 3, generator=generator, dtype=torch.float64) + torch.tensor([1.0, 0.0, 0.5])
    nothing = torch.zeros(100, 3, dtype=torch.float64)
    truth = explained_by_shift(torch.zeros_like(shift), shift)
    found = [shift_interval(nothing, part) for part in shift.split(100)]
    assert 0.9 < sum(low <= truth <= high for _, low, high in found) / 200 <= 0.99


def test_all_of_it_with_a_dead_channel() -> None:
    clean, adversarial = features()
    clean[:, 2], adversarial[:, 2] = 0, 0
    found = measure(clean, adversarial)
    alive = [c for c in range(7) if c != 2]
    assert found.channels == 7 and math.isnan(found.by_channel[2])
    assert found.mean_shift == pytest.approx(float(mean_shift(clean, adversarial)[alive].mean()))
    assert found.wasserstein == pytest.approx(float(wasserstein(clean, adversarial)[alive].mean()))
