"""What a task is, and how its figures are estimated.

A task's data is a retrieval set, so that every attack of `fastmat.attacks` acts on it as it is: a row is a picture with
its texts. What is right about a row, boxes or a label, the task knows by the row's position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fastmat.data.retrieval import RetrievalSet
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import AttackContext, Batch


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure of N rows. sums: [N, K] float64; value: what the K totals [..., K] say, [...].

    So a bootstrap is one product of multiplicities and sums, whatever the figure is.
    """

    sums: Tensor
    value: Callable[[Tensor], Tensor]


def share(hits: Tensor, counted: Tensor | None = None) -> Metric:
    """Of the rows that are counted (None: all), the share that is right, in percent; [N] bool each."""
    counted = torch.ones_like(hits) if counted is None else counted
    return Metric(
        sums=torch.stack([hits & counted, counted], 1).double(),
        value=lambda totals: 100 * totals[..., 0] / totals[..., 1],
    )


def mean(values: Tensor) -> Metric:
    """Of a value per row, [N], times 100."""
    sums = torch.stack([values.double(), torch.ones(len(values), dtype=torch.float64)], 1)
    return Metric(sums=sums, value=lambda totals: 100 * totals[..., 0] / totals[..., 1])


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a model made of N rows.

    metrics: by name. right: [N] bool, None where a row is not right or wrong. said: its answers in words. boxes: the
    answers as x, y, width, height, in parts of the picture; empty where there are none.
    """

    metrics: Mapping[str, Metric]
    right: Tensor | None
    said: tuple[str, ...]
    boxes: tuple[tuple[float, ...], ...] = field(default=())


class Task(Protocol):
    """name: of the task. data: its rows. picture: [N] int64, equal for rows of one picture. wanted: per row, the right
    answer in words, for examples; wanted_boxes: in parts of the picture, empty where there are none."""

    name: str
    data: RetrievalSet
    picture: Tensor
    wanted: tuple[str, ...]
    wanted_boxes: tuple[tuple[float, ...], ...]

    def check(self, model: VisionLanguageModel) -> None:
        """Raises UserError when the model cannot do the task."""
        ...

    def judge(self, model: VisionLanguageModel, batches: Iterable[Batch]) -> Judged:
        """The model's answers to the first N rows, clean or attacked, in order; `Batch.index` says which."""
        ...


@runtime_checkable
class Classifying(Task, Protocol):
    """A task that tells classes apart: attacks contrast with them, and several attacks of one budget have a row for the
    worst case over them."""

    def context(self, model: VisionLanguageModel, batches: Iterable[Batch]) -> AttackContext:
        """Frozen features of the classes and of the clean rows. batches: these rows."""
        ...

    def counted(self, right: Tensor) -> Judged:
        """What right rows [N] bool amount to."""
        ...


def estimates(
    metrics: Mapping[str, Metric], picture: Tensor, *, seed: int, resamples: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Values, and 95 % bootstrap percentile intervals. Metrics without a value (nothing counted) are left out.

    picture: [N]; pictures are resampled with replacement and take their rows along, which are not independent.

    >>> values, _ = estimates({"accuracy": share(torch.tensor([True, False]))}, torch.arange(2), seed=0, resamples=2)
    >>> values
    {'accuracy': 50.0}
    """
    units, unit = picture.unique(return_inverse=True)
    drawn = torch.randint(len(units), (resamples, len(units)), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(resamples, len(units), dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    values, intervals = {}, {}
    for name, metric in metrics.items():
        value = float(metric.value(metric.sums.sum(0)))
        if value != value:
            continue
        totals = torch.zeros(len(units), metric.sums.shape[1], dtype=torch.float64).index_add_(0, unit, metric.sums)
        bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = metric.value(weights @ totals).nanquantile(bounds).tolist()
        values[name], intervals[name] = value, (low, high)
    return values, intervals
