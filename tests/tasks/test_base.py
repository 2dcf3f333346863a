"""Figures and their intervals, against a plain bootstrap."""

import pytest
import torch

from fastmat.tasks.base import estimates, mean, share


def test_intervals_resample_pictures_with_their_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.tensor([7, 7, 7, 2, 2, 5, 9, 9, 9, 9])
    right = torch.rand(10, generator=generator) < 0.5
    counted, values = torch.arange(10) % 3 > 0, torch.rand(10, generator=generator)
    found, intervals = estimates({"share": share(right, counted), "mean": mean(values)}, picture, seed=3, resamples=400)
    assert found["share"] == pytest.approx(100 * int((right & counted).sum()) / int(counted.sum()))
    assert found["mean"] == pytest.approx(100 * float(values.mean()))
    drawn = torch.randint(4, (400, 4), generator=torch.Generator().manual_seed(3))
    shares, means = [], []
    for pictures in drawn.tolist():
        rows = [row for unit in pictures for row in range(10) if picture[row] == picture.unique()[unit]]
        own = [bool(right[row]) for row in rows if counted[row]]
        if own:
            shares.append(100 * sum(own) / len(own))
        means.append(100 * sum(float(values[row]) for row in rows) / len(rows))
    for name, resampled in (("share", shares), ("mean", means)):
        bounds = torch.tensor(resampled, dtype=torch.float64).quantile(
            torch.tensor([0.025, 0.975], dtype=torch.float64)
        )
        assert intervals[name] == pytest.approx(tuple(bounds.tolist()))


def test_a_figure_that_nothing_counts_for_is_left_out() -> None:
    right = torch.tensor([True, False])
    values, intervals = estimates({"none": share(right, ~right & right)}, torch.arange(2), seed=0, resamples=5)
    assert values == intervals == {}
