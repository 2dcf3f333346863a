"""Recall, attack success rate and their bootstrap intervals: pure functions of ranks, everything in percent.

A rank is 0 for the best place (`fastmat.ops.retrieval_ranks`). TR: a query image ranks captions, the best of its own
captions counts. IR: a query caption ranks images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmat.errors import UserError
from fastmat.evaluation.multi_positive import Retrieved, worst_of

KS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """tr [N]: ranks of the image queries; ir [T]: ranks of the caption queries; txt2img [T]: the image of each caption.

    All int64. under: the same retrieval under other ground truths (`fastmat.data.truth`), by label.
    """

    tr: Tensor
    ir: Tensor
    txt2img: Tensor
    under: Mapping[str, Retrieved] = field(default_factory=dict)


def recall_at(ranks: Tensor, k: int) -> float:
    """Share of queries with rank < k, in percent; nan without queries. ranks [Q] int64.

    >>> recall_at(torch.tensor([0, 4, 5, 0]), 1), recall_at(torch.tensor([0, 4, 5, 0]), 5)
    (50.0, 75.0)
    """
    return 100.0 * int((ranks < k).sum()) / len(ranks) if len(ranks) else float("nan")


def attack_success_rate(clean_ranks: Tensor, ranks: Tensor, k: int) -> float | None:
    """ASR@k: of the queries right when clean, the share wrong after the attack, in percent (SGA, ICCV 2023).

    clean_ranks, ranks [Q] int64, the same queries before and after. None when no query was right. It is not the
    difference of the two recalls, which also counts queries that the attack happens to repair.

    >>> attack_success_rate(torch.tensor([0, 0, 3, 2]), torch.tensor([0, 7, 0, 2]), 1)
    50.0
    >>> attack_success_rate(torch.tensor([3, 2]), torch.tensor([0, 2]), 1) is None
    True
    """
    right = clean_ranks < k
    return 100.0 * int((right & (ranks >= k)).sum()) / int(right.sum()) if bool(right.any()) else None


def recalls(ranks: Ranks) -> dict[str, float]:
    """ "tr@1" ... "ir@10".

    >>> recalls(Ranks(tr=torch.tensor([0]), ir=torch.tensor([0, 6]), txt2img=torch.tensor([0, 0])))["ir@5"]
    50.0
    """
    return {f"{way}@{k}": recall_at(getattr(ranks, way), k) for way in ("tr", "ir") for k in KS}


def success_rates(clean: Ranks, ranks: Ranks) -> dict[str, float | None]:
    """ "asr_tr@1" ... "asr_ir@10" of the same queries before and after."""
    return {
        f"asr_{way}@{k}": attack_success_rate(getattr(clean, way), getattr(ranks, way), k)
        for way in ("tr", "ir")
        for k in KS
    }


def worst_case(runs: Sequence[Ranks]) -> Ranks:
    """Each query's worst rank over several attacks on the same data: it is right only if it is right in every one.

    Each run's ranks are those in its own gallery; under another ground truth, each figure of a query is its worst.
    Raises UserError without a run or when the queries are not the same.

    >>> one = Ranks(tr=torch.tensor([0, 3]), ir=torch.tensor([0, 1]), txt2img=torch.tensor([0, 1]))
    >>> two = Ranks(tr=torch.tensor([2, 0]), ir=torch.tensor([0, 5]), txt2img=torch.tensor([0, 1]))
    >>> worst_case([one, two]).tr.tolist(), worst_case([one, two]).ir.tolist()
    ([2, 3], [0, 5])
    """
    if not runs:
        raise UserError("there is no run to take the worst of: hand in the ranks of at least one attack")
    first = runs[0]
    for other in runs[1:]:
        if len(other.tr) != len(first.tr) or not torch.equal(other.txt2img, first.txt2img):
            raise UserError(
                f"runs must have the same queries, but there are {len(first.tr)} images and {len(first.ir)} captions "
                f"in one, {len(other.tr)} and {len(other.ir)} or other pairs in another"
            )
    return Ranks(
        tr=torch.stack([run.tr for run in runs]).amax(0),
        ir=torch.stack([run.ir for run in runs]).amax(0),
        txt2img=first.txt2img,
        under={
            label: Retrieved(
                tr=worst_of([run.under[label].tr for run in runs]), ir=worst_of([run.under[label].ir for run in runs])
            )
            for label in first.under
        },
    )


def bootstrap_intervals(
    ranks: Ranks, clean: Ranks | None = None, *, seed: int = 0, resamples: int = 1000
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of every recall and, when `clean` is given, of every ASR.

    Images are resampled with replacement and take all their captions along, since the captions of one image are not
    independent. ASR leaves out resamples in which no query was right; a metric without a value has no interval.
    """
    return ratio_intervals(_sums_per_image(ranks, clean), len(ranks.tr), seed=seed, resamples=resamples)


def ratio_intervals(
    sums: Mapping[str, tuple[Tensor, Tensor]], images: int, *, seed: int, resamples: int
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals over `images`, in percent, of metrics that are ratios of two sums over images.

    sums: metric to numerators and denominators [images] fp64. All resamples of all metrics are one product of the
    [resamples, images] multiplicities with them.
    """
    weights = _multiplicities(images, resamples=resamples, seed=seed)
    values = 100 * (weights @ torch.stack([hit for hit, _ in sums.values()], 1))
    values /= weights @ torch.stack([count for _, count in sums.values()], 1)
    low, high = values.nanquantile(torch.tensor([0.025, 0.975], dtype=values.dtype), dim=0).tolist()
    return {name: (a, b) for name, a, b in zip(sums, low, high, strict=True) if a == a}


def _sums_per_image(ranks: Ranks, clean: Ranks | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Metric name to (hits [N], queries [N]) in float64, whose sums' ratio is the metric."""
    n = len(ranks.tr)

    def per_image(flags: Tensor) -> Tensor:
        return torch.zeros(n, dtype=torch.float64).index_add_(0, ranks.txt2img.cpu(), flags.cpu().double())

    def per_query(flags: Tensor) -> Tensor:
        return flags.cpu().double()

    ways: dict[str, Callable[[Tensor], Tensor]] = {"tr": per_query, "ir": per_image}
    sums = {}
    for way, total in ways.items():
        after: Tensor = getattr(ranks, way)
        for k in KS:
            sums[f"{way}@{k}"] = total(after < k), total(torch.ones_like(after))
            if clean is not None:
                right = getattr(clean, way) < k
                sums[f"asr_{way}@{k}"] = total(right & (after >= k)), total(right)
    return sums


def _multiplicities(n: int, *, resamples: int, seed: int) -> Tensor:
    """[resamples, n] float64: how often each image is drawn."""
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(1, 1, dtype=torch.float64).expand(resamples, n)
    )
