"""From counts to verdicts: what a guard seems to give, what is left of it, and whether that is more than nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from fastmat.evaluation.metrics import KS
from fastmat.evaluation.stages import Counts
from fastmat.studies.estimates import draws, interval
from fastmat.studies.test_time_results import Detection, Estimate, Verdict

CLEAN = ("none", "")
Made = tuple[str, str]  # attack, and "bare" or "guard"; CLEAN
Measured = Mapping[Made, Mapping[str, Counts]]
GUARDS = {
    "none": "no guard",
    "jpeg": "JPEG",
    "resize_pad": "resize and pad",
    "frequency_masking": "frequency masking",
    "ttc": "TTC",
}
MOST = 0.5  # share of a claimed gain that must remain for a guard to hold


def with_means(counts: Mapping[str, Counts]) -> dict[str, Counts]:
    """`counts`, and "r@K": the mean of TR@K and IR@K, as one ratio of sums over images.

    >>> one, two = torch.tensor([1.0]), torch.tensor([2.0])
    >>> of = {"tr": Counts(one, one), "ir": Counts(one, two)}
    >>> hits, queries = with_means({f"{way}@{k}": of[way] for way in of for k in (1, 5, 10)})["r@1"]
    >>> float(hits / queries)
    0.75
    """
    made = dict(counts)
    for k in KS:
        tr, ir = counts[f"tr@{k}"], counts[f"ir@{k}"]
        weight = ir.queries.sum() / tr.queries.sum()  # captions per image
        made[f"r@{k}"] = Counts(weight * tr.hits + ir.hits, weight * tr.queries + ir.queries)
    return made


class Bootstrap:
    """Intervals over the same resamples of images, so that differences are paired."""

    def __init__(self, images: int, *, resamples: int) -> None:
        self.drawn = draws(images, 1, seed=0, resamples=resamples)

    def estimate(self, counts: Counts) -> Estimate:
        found = interval([counts], *self.drawn)
        assert found is not None  # every image and caption is a query
        return found

    def gain(self, now: Counts, before: Counts) -> Estimate:
        """`now` minus `before`, of the same queries."""
        return self.estimate(Counts(now.hits - before.hits, now.queries))


def value(counts: Counts) -> float:
    return float(counts.hits.sum() / counts.queries.sum())


def judge(model: str, guard: str, own: Measured, bare: Measured, metric: str, bootstrap: Bootstrap) -> Verdict:
    """own, bare: everything that was measured with and without the guard.

    Of several attacks the one that leaves least counts. Who knows the guard may also leave it aside: attacks on the
    bare model are among the adaptive ones.
    """
    attacks = [made for made in own if made != CLEAN]
    claimed, adaptive, least = (
        min(made, key=lambda made: value(of[made][metric]))
        for made, of in (
            ([made for made in attacks if made[1] == "bare"], own),
            (attacks, own),
            ([made for made in bare if made != CLEAN], bare),
        )
    )
    broken, clean = bare[least][metric], own[CLEAN][metric]
    gains = {
        "clean_gain": bootstrap.gain(clean, bare[CLEAN][metric]),
        "claimed_gain": bootstrap.gain(own[claimed][metric], broken),
        "adaptive_gain": bootstrap.gain(own[adaptive][metric], broken),
    }
    return Verdict(
        model=model,
        guard=guard,
        clean=bootstrap.estimate(clean),
        claimed=bootstrap.estimate(own[claimed][metric]),
        claimed_by=claimed[0],
        adaptive=bootstrap.estimate(own[adaptive][metric]),
        adaptive_by=adaptive[0] if adaptive[1] == "guard" else f"{adaptive[0]}, made on the bare model",
        verdict=verdict_of(**gains),
        **gains,
    )


def verdict_of(*, clean_gain: Estimate, claimed_gain: Estimate, adaptive_gain: Estimate) -> str:
    """In words; an interval that holds 0 is no gain and no loss.

    >>> verdict_of(clean_gain=(-1, -2, 0.5), claimed_gain=(30, 25, 35), adaptive_gain=(0.5, -1, 2))
    'gains nothing adaptively'
    >>> verdict_of(clean_gain=(-3, -5, -1), claimed_gain=(30, 25, 35), adaptive_gain=(4, 2, 6))
    'gains less than half of what it claims, and costs clean recall'
    """
    if adaptive_gain[2] < 0:
        told = "loses adaptively"
    elif adaptive_gain[1] <= 0:
        told = "gains nothing adaptively"
    elif adaptive_gain[0] < MOST * claimed_gain[0]:
        told = "gains less than half of what it claims"
    else:
        told = "holds most of what it claims"
    return f"{told}, and costs clean recall" if clean_gain[2] < 0 else told


def answer(verdicts: Sequence[Verdict], *, at: int) -> tuple[str, str]:
    """The study in two sentences: whether a guard helps, and what the best-looking one claimed."""
    named = [(verdict, f"{guard_name(verdict.guard)} on {verdict.model}") for verdict in verdicts]
    metric = f"mean recall at {at}"
    helps = [(own, name) for own, name in named if own.adaptive_gain[1] > 0]
    if helps:
        told = ", ".join(f"{name} {points(own.adaptive_gain)}" for own, name in helps)
        rest = "" if len(helps) == len(named) else "; the others gain nothing"
        first = (
            f"Attacked through themselves, {len(helps)} of {len(named)} pairings of guard and model keep more {metric} "
            f"than the bare model under its own strongest attack, in points with 95 % intervals: {told}{rest}."
        )
    else:
        best, name = max(named, key=lambda pair: pair[0].adaptive_gain[0])
        first = (
            f"It does not help: attacked through itself, none of {len(named)} pairings of guard and model keeps more "
            f"{metric} than the bare model under its own strongest attack; at best {name}, with "
            f"{points(best.adaptive_gain)} points (95 % interval)."
        )
    most, name = max(named, key=lambda pair: pair[0].claimed_gain[0])
    second = (
        f"Judged by attacks that do not know of it, {name} looks best and seems to gain {points(most.claimed_gain)} "
        f"points, of which {points(most.adaptive_gain)} remain when the attack knows it."
    )
    return first, second


def guard_name(name: str) -> str:
    return GUARDS.get(name, name)


def points(estimate: Estimate) -> str:
    """
    >>> points((12.34, 10.0, 15.0))
    '+12.3 [+10.0, +15.0]'
    """
    shown, low, high = (f"{number + 0.0:+.1f}" for number in estimate)
    return f"{shown} [{low}, {high}]"


def detection(
    model: str, against: str, clean: Tensor, attacked: Tensor, bootstrap: Bootstrap, *, adaptive: bool
) -> Detection:
    """How well scores [N] of attacked images stand above those [N] of the same images clean; 0 is the threshold."""
    truth = torch.cat([torch.zeros(len(clean)), torch.ones(len(attacked))])
    alarms, found, _ = roc_curve(truth, torch.cat([clean, attacked]))
    area = 100 * float(roc_auc_score(truth, torch.cat([clean, attacked])))
    # The area is the share of pairs in order, so a resample of images is a product with the table of pairs.
    order = ((attacked[:, None] > clean).double() + (attacked[:, None] == clean).double() / 2) * 100
    weights = bootstrap.drawn[0]
    areas = ((weights @ order) * weights).sum(1) / weights.sum(1) ** 2
    low, high = areas.quantile(torch.tensor([0.025, 0.975], dtype=areas.dtype)).tolist()
    flagged = {"false_alarms": clean, "found": attacked}
    return Detection(
        model=model,
        against=against,
        adaptive=adaptive,
        auc=(area, low, high),
        curve=[(100 * float(x), 100 * float(y)) for x, y in zip(alarms, found, strict=True)],
        **{
            name: bootstrap.estimate(Counts((scores > 0).double(), torch.ones(len(scores), dtype=torch.float64)))
            for name, scores in flagged.items()
        },
    )
