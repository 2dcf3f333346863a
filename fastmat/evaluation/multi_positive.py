"""How queries with any number of right answers fare: pure functions of where those answers stand.

A place is 0 for the best. The j-th best of a query's right answers (from 0) stands at j + #(wrong answers with a higher
score) + #(wrong ones that tie with it) // 2: for the best one that is the rank of `fastmat.ops.ranks`, and a model that
gives everything one score stands in the middle. A NaN never improves a place.

R-precision and mAP@R are those of ECCV Caption (Chun et al., ECCV 2022; mAP@R after Musgrave et al., ECCV 2020): with R
right answers, the share of right ones among the first R, and the mean over those R places of the precision up to a
place where a right one stands there, else 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastmat.data.truth import Positives
from fastmat.ops.scores import score_tiles

# Scores that are sorted at a time: beside them stand their order and their copies.
SCORES_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}


@dataclass(frozen=True, kw_only=True)
class Found:
    """How Q queries of one direction fared, on the CPU.

    image [Q] int64: row of the set that the query is, or whose caption it is. count [Q] int64: its right answers.
    rank [Q] int64: place of the best of them. r_precision, average_precision [Q] fp64 in [0, 1].
    """

    image: Tensor
    count: Tensor
    rank: Tensor
    r_precision: Tensor
    average_precision: Tensor


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """tr: images ranked captions; ir: captions ranked images."""

    tr: Found
    ir: Found


def r_precision(places: Tensor, count: Tensor) -> Tensor:
    """[Q] fp64. count [Q]: right answers of each query, at least one; places [count.sum()]: theirs, ascending.

    Two right answers in the first and the third place: one of the first two places is right.

    >>> r_precision(torch.tensor([0, 2]), torch.tensor([2])).tolist()
    [0.5]
    """
    hit = places < count.repeat_interleave(count)
    return _per_query(hit.double(), count) / count


def average_precision(places: Tensor, count: Tensor) -> Tensor:
    """[Q] fp64, whose mean is mAP@R; arguments as `r_precision`.

    In places 0, 2 and 5, with R = 3: (1/1 + 0 + 2/3) / 3.

    >>> average_precision(torch.tensor([0, 2, 5]), torch.tensor([3])).tolist() == [(1 + 2 / 3) / 3]
    True
    """
    nth = _nth(count) + 1
    hit = places < count.repeat_interleave(count)
    return _per_query(hit * nth / (places + 1.0).double(), count) / count


def positive_places(tiles: Iterable[tuple[slice, Tensor]], count: Tensor, items: Tensor) -> Tensor:
    """[count.sum()] int64, on the CPU: the places of every query's right answers, ascending.

    tiles: rows of queries and their scores [rows, G], which are overwritten. count [Q], items [count.sum()]: the right
    columns of each query (`Positives`). Memory: some copies of a tile.

    >>> scores = torch.tensor([[0.9, 0.1, 0.5, 0.5]])
    >>> positive_places([(slice(0, 1), scores)], torch.tensor([2]), torch.tensor([1, 2])).tolist()
    [1, 3]
    """
    first = count.cumsum(0) - count
    places = []
    for rows, tile in tiles:
        own_count, total = count[rows, None], tile.shape[1]
        slot = torch.arange(int(own_count.max()))
        held = slot < own_count
        columns = items[first[rows, None] + slot.minimum(own_count - 1)].to(tile.device)
        own = tile.gather(1, columns).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        own = own.masked_fill(~held.to(tile.device), -torch.inf).sort(1, descending=True).values
        # Out of the way of the wrong answers, among which they shall not be counted.
        wrong = tile.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        wrong = _ascending(wrong.scatter_(1, columns, -torch.inf))
        upper = torch.searchsorted(wrong, own, right=True)
        tied = upper - torch.searchsorted(wrong, own)
        before = (total - upper + tied // 2).cpu()
        before = torch.where(own.cpu() == -torch.inf, total - own_count, before)
        places.append((before + slot)[held])
    return torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)


def cosine_tiles(queries: Tensor, gallery: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Scores [rows, G] of a few of the queries [Q, D] at a time, with all of the gallery [G, D]."""
    for rows, _, tile in score_tiles(queries, gallery, columns=len(gallery)):
        for start in range(0, len(tile), _rows_at_once(tile)):
            part = tile[start : start + _rows_at_once(tile)]
            yield slice(rows.start + start, rows.start + start + len(part)), part


def reranked_tiles(scores: Tensor, candidates: Tensor, *, total: int) -> Iterator[tuple[slice, Tensor]]:
    """The same of a second stage: what is not on the shortlist has one score below all others.

    scores [Q, k], finite; candidates [Q, k]: their places among `total`.
    """
    step = max(1, SCORES_AT_ONCE.get(scores.device.type, SCORES_AT_ONCE["cpu"]) // total)
    for start in range(0, len(scores), step):
        some = scores[start : start + step]
        tile = some.new_full((len(some), total), torch.finfo(some.dtype).min)
        yield slice(start, start + len(some)), tile.scatter_(1, candidates[start : start + step], some)


def found_at(places: Tensor, positives: Positives, image: Tensor) -> Found:
    """image [Q]: row of the set of each query."""
    count = positives.count
    return Found(
        image=image,
        count=count,
        rank=places[count.cumsum(0) - count],
        r_precision=r_precision(places, count),
        average_precision=average_precision(places, count),
    )


def worst_of(runs: Sequence[Found]) -> Found:
    """Of every query the worst of each figure over several attacks on the same data."""
    return Found(
        image=runs[0].image,
        count=runs[0].count,
        rank=torch.stack([run.rank for run in runs]).amax(0),
        r_precision=torch.stack([run.r_precision for run in runs]).amin(0),
        average_precision=torch.stack([run.average_precision for run in runs]).amin(0),
    )


def of_images(found: Found, images: Tensor) -> Found:
    """The queries of the rows `images`."""
    kept = torch.isin(found.image, images)
    return Found(**{part.name: getattr(found, part.name)[kept] for part in fields(Found)})


def _ascending(tile: Tensor) -> Tensor:
    """Rows in order, in place where that can be: on a CPU NumPy sorts with vector instructions, torch does not."""
    if tile.device.type != "cpu":
        return tile.sort(1).values
    tile.numpy().sort(axis=1)
    return tile


def _rows_at_once(tile: Tensor) -> int:
    return max(1, SCORES_AT_ONCE.get(tile.device.type, SCORES_AT_ONCE["cpu"]) // tile.shape[1])


def _nth(count: Tensor) -> Tensor:
    """0, 1, ... within each query."""
    return torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)


def _per_query(values: Tensor, count: Tensor) -> Tensor:
    """Sums [Q] of values [count.sum()] fp64."""
    query = torch.arange(len(count)).repeat_interleave(count)
    return torch.zeros(len(count), dtype=torch.float64).index_add_(0, query, values)
