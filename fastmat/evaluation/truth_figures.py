"""A row's figures under another ground truth, in percent, with their bootstrap intervals."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmat.evaluation.metrics import KS, ratio_intervals
from fastmat.evaluation.multi_positive import Found, Retrieved
from fastmat.evaluation.results import UnderTruth

WAYS = ("tr", "ir")


def figures_under(after: Retrieved, clean: Retrieved | None, *, seed: int, resamples: int) -> UnderTruth:
    """ "tr@1" ... "ir@10" of the best right answer, "tr_rp", "ir_rp", "tr_map@r", "ir_map@r", and, when `clean` (the
    same queries) is given, "asr_tr@1" ... "asr_ir@10".

    A metric without a query is None. Images are resampled that are queries or whose captions are; see
    `fastmat.evaluation.metrics.bootstrap_intervals`.
    """
    images = torch.cat([after.tr.image, after.ir.image]).unique()
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for way in WAYS:
        found = getattr(after, way)
        for name, (hits, queries) in _ratios(way, found, getattr(clean, way) if clean else None).items():
            sums[name] = _per_image(hits, found.image, images), _per_image(queries, found.image, images)
    values = {name: _percent(hits, queries) for name, (hits, queries) in sums.items()}
    none = {f"asr_{way}@{k}": None for way in WAYS for k in KS} if clean is None else {}
    return UnderTruth(
        n_images=len(after.tr.image),
        n_captions=len(after.ir.image),
        right_captions=_mean(after.tr.count),
        right_images=_mean(after.ir.count),
        metrics={**values, **none},
        ci=ratio_intervals(sums, len(images), seed=seed, resamples=resamples) if len(images) else {},
    )


def _ratios(way: str, found: Found, clean: Found | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Metric to (hits [Q], queries [Q]), whose sums' ratio it is."""
    one = torch.ones_like(found.r_precision)
    made = {f"{way}@{k}": ((found.rank < k).double(), one) for k in KS}
    made |= {f"{way}_rp": (found.r_precision, one), f"{way}_map@r": (found.average_precision, one)}
    for k in KS if clean is not None else ():
        assert clean is not None
        right = clean.rank < k
        made[f"asr_{way}@{k}"] = (right & (found.rank >= k)).double(), right.double()
    return made


def _per_image(values: Tensor, image: Tensor, images: Tensor) -> Tensor:
    place = torch.searchsorted(images, image)
    return torch.zeros(len(images), dtype=torch.float64).index_add_(0, place, values)


def _percent(hits: Tensor, queries: Tensor) -> float | None:
    total = float(queries.sum())
    return 100.0 * float(hits.sum()) / total if total else None


def _mean(count: Tensor) -> float | None:
    return float(count.double().mean()) if len(count) else None
