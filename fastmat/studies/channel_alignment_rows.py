"""From ranks of every seed to rates with intervals, and to differences between corrections on the same images."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from fastmat.cli.ensembles import ranks_of_rows
from fastmat.evaluation.metrics import Ranks, worst_case
from fastmat.evaluation.stages import Counts, Stages, counts_of
from fastmat.studies.channel_alignment_results import Row, Versus
from fastmat.studies.estimates import estimates

Cell = tuple[str, str]  # attack, made on
Found = dict[tuple[str, str], Mapping[Cell, Ranks]]  # (model, correction) to outcomes, of one seed
Outcomes = dict[Cell, Ranks]
WORST: Cell = ("worst", "")
ALL: Cell = ("all", "")
METRICS = ("tr@1", "tr@10", "ir@1", "ir@10")


def rates(ranks: Ranks) -> dict[str, Counts]:
    """Counts per image: recalls, and "r@1", "r@10", "mean": of both ways, the mean over images.

    >>> one = Ranks(tr=torch.tensor([0]), ir=torch.tensor([3, 0]), txt2img=torch.tensor([0, 0]))
    >>> {name: float(c.hits.sum() / c.queries.sum()) for name, c in rates(one).items() if name[0] != "t"}
    {'ir@1': 0.5, 'ir@10': 1.0, 'r@1': 0.75, 'r@10': 1.0, 'mean': 0.875}
    """
    found = {name: counts for name, counts in counts_of(Stages(ranks={"itc": ranks}), "itc").items() if name in METRICS}
    own = {name: counts.hits / counts.queries for name, counts in found.items()}
    ones = torch.ones(len(ranks.tr), dtype=torch.float64)
    for k in (1, 10):
        found[f"r@{k}"] = Counts((own[f"tr@{k}"] + own[f"ir@{k}"]) / 2, ones)
    found["mean"] = Counts((found["r@1"].hits + found["r@10"].hits) / 2, ones)
    return found


def difference(a: Mapping[str, Counts], b: Mapping[str, Counts]) -> dict[str, Counts]:
    """a minus b, image by image."""
    return {name: Counts(a[name].hits - b[name].hits, a[name].queries) for name in a}


def with_worst(cells: Mapping[Cell, Ranks], images: Mapping[str, Sequence[int]], partial: Collection[str]) -> Outcomes:
    """The outcomes and two worst cases: over the attacks that are not `partial`, on every image; and, where every
    attack went through the correction, over all of them, on the images that all attacked.

    partial: attacks on some images, or through some corrections. images: of each attack, ascending; a smaller draw is
    part of every larger one.
    """
    attacked = {cell: ranks for cell, ranks in cells.items() if cell[0] != "none"}
    whole = [ranks for (attack, _), ranks in attacked.items() if attack not in partial]
    found = {**cells, **({WORST: worst_case(whole)} if whole else {})}
    if partial and all((attack, "corrected") in cells for attack in images):
        common = min(images.values(), key=len)
        found[ALL] = worst_case([ranks_of_rows(ranks, images[cell[0]], common) for cell, ranks in attacked.items()])
    return found


def baseline(cell: Cell) -> Cell:
    """Where the model without a correction met the same attack: made on it, that attack is adaptive."""
    return (cell[0], "corrected") if cell[1] == "uncorrected" else cell


def rows_of(
    found: Sequence[Found], *, images: Mapping[str, Sequence[int]], partial: Collection[str], resamples: int
) -> Iterator[Row]:
    """A row for every model, correction and attack, over the seeds in `found`."""
    for model, correction in found[0]:
        seeds = [with_worst(of_seed[model, correction], images, partial) for of_seed in found]
        plain = [with_worst(of_seed[model, "none"], images, partial) for of_seed in found]
        for cell in seeds[0]:
            counts = [rates(cells[cell]) for cells in seeds]
            before = [rates(cells[baseline(cell)]) for cells in plain]
            changed = [difference(now, then) for now, then in zip(counts, before, strict=True)]
            yield Row(
                model=model,
                correction=correction,
                attack=cell[0],
                made_on=cell[1],
                n_images=len(seeds[0][cell].tr),
                values=estimates(counts, resamples=resamples),
                change={} if correction == "none" else estimates(changed, resamples=resamples),
            )


def changes_against(
    found: Sequence[Found],
    dynamic: str | None,
    *,
    images: Mapping[str, Sequence[int]],
    partial: Collection[str],
    resamples: int,
) -> Iterator[Versus]:
    """The dynamic correction minus every other one, under every attack that both met."""
    for model, other in found[0]:
        if dynamic is None or other in ("none", dynamic):
            continue
        ours = [with_worst(of_seed[model, dynamic], images, partial) for of_seed in found]
        theirs = [with_worst(of_seed[model, other], images, partial) for of_seed in found]
        for cell in ours[0]:
            if cell in theirs[0]:
                counts = [difference(rates(a[cell]), rates(b[cell])) for a, b in zip(ours, theirs, strict=True)]
                values = estimates(counts, resamples=resamples)
                yield Versus(model=model, dynamic=dynamic, other=other, attack=cell[0], made_on=cell[1], values=values)
