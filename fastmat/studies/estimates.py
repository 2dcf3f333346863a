"""Rates of several models on the same queries, with intervals that know of both: which seeds, and which images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastmat.evaluation.stages import Counts

Interval = tuple[float, float, float]


def estimates(
    models: Sequence[Mapping[str, Counts]], *, seed: int = 0, resamples: int = 1000
) -> dict[str, Interval | None]:
    """Metric to (value, low, high), in percent: the mean over `models`, trained alike with other seeds, and its 95 %
    percentile bootstrap, in which models and images are both drawn with replacement; one model is drawn always.

    Images are the same in every model and take all their captions along. A rate of no queries at all is None. With few
    seeds the interval is too narrow for what seeds do: three show little of a spread.

    >>> one = {"tr@1": Counts(torch.tensor([1.0, 0.0]).double(), torch.ones(2).double())}
    >>> estimates([one, one])["tr@1"]
    (50.0, 0.0, 100.0)
    """
    of_images, of_models = draws(len(next(iter(models[0].values())).hits), len(models), seed=seed, resamples=resamples)
    return {name: interval([model[name] for model in models], of_images, of_models) for name in models[0]}


def interval(models: Sequence[Counts], of_images: Tensor, of_models: Tensor) -> Interval | None:
    """One rate. of_images [R, N], of_models [R, S]: how often each is drawn."""
    hits, queries = (torch.stack([getattr(model, part) for model in models]) for part in Counts._fields)
    if not bool(queries.any()):
        return None
    value = 100 * float(hits.sum() / queries.sum())
    # [R, S] sums over the images drawn, then [R] over the models drawn.
    of = ((of_images @ queries.T) * of_models).sum(1)
    drawn = 100 * ((of_images @ hits.T) * of_models).sum(1) / of.where(of > 0, torch.nan)
    low, high = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return value, low, high


def draws(images: int, models: int, *, seed: int, resamples: int) -> tuple[Tensor, Tensor]:
    """[R, images] and [R, models] float64 multiplicities."""
    generator = torch.Generator().manual_seed(seed)
    counted = []
    for n in (images, models):
        drawn = torch.randint(n, (resamples, n), generator=generator)
        ones = torch.ones(1, 1, dtype=torch.float64).expand(resamples, n)
        counted.append(torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, drawn, ones))
    return counted[0], counted[1]
