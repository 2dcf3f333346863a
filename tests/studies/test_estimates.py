"""Intervals over seeds and images, by plain loops over the same draws."""

import numpy as np
import pytest
import torch

from fastmat.evaluation.stages import Counts
from fastmat.studies.estimates import draws, estimates


def counts(seed: int, images: int = 12) -> Counts:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(1, 6, (images,), generator=generator).double()
    return Counts((queries * torch.rand(images, generator=generator).double()).floor(), queries)


def test_by_loops() -> None:
    models = [{"a": counts(seed), "b": counts(seed + 10)} for seed in range(3)]
    found = estimates(models, seed=5, resamples=40)
    of_images, of_models = draws(12, 3, seed=5, resamples=40)
    assert (of_images.sum(1) == 12).all() and (of_models.sum(1) == 3).all()
    for name in ("a", "b"):
        values = []
        for r in range(40):
            hits = queries = 0.0
            for s, model in enumerate(models):
                for i in range(12):
                    weight = float(of_images[r, i] * of_models[r, s])
                    hits += weight * float(model[name].hits[i])
                    queries += weight * float(model[name].queries[i])
            values.append(100 * hits / queries)
        total = [sum(float(getattr(model[name], part).sum()) for model in models) for part in ("hits", "queries")]
        assert found[name] == pytest.approx((100 * total[0] / total[1], *np.quantile(values, [0.025, 0.975])))


def test_rates_of_nothing() -> None:
    none = Counts(torch.zeros(4).double(), torch.zeros(4).double())
    rare = Counts(torch.tensor([-1.0, 0, 0, 0]).double(), torch.tensor([0.0, 1, 0, 0]).double())
    found = estimates([{"none": none, "rare": rare}], resamples=200)
    assert found["none"] is None
    # Resamples without a query that counts are left out, and none is infinite.
    assert found["rare"] is not None and all(np.isfinite(found["rare"]))


def test_other_seeds_widen_the_interval() -> None:
    alike = Counts(torch.full((50,), 0.5).double(), torch.ones(50).double())
    high = Counts(torch.full((50,), 0.9).double(), torch.ones(50).double())
    one, two = (estimates([{"a": alike}, {"a": other}])["a"] for other in (alike, high))
    assert one == pytest.approx((50, 50, 50))
    assert two == pytest.approx((70, 50, 90))
