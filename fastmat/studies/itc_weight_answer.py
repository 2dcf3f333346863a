"""The study of the contrastive weight in a few sentences, worded by its own figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fastmat.studies.estimates import Interval
from fastmat.studies.results import Line

PUBLISHED = "1:1"


def answer(
    lines: Sequence[Line], *, adversarial: Sequence[str], scorings: Mapping[str, str], defences: Mapping[str, str]
) -> str:
    """Of each part: what the weight does to the worst case; of a fusion model also what ranking does.

    adversarial: the attacks that ascend a loss, among which the worst is. scorings, defences: their names.
    """
    said = []
    for part in dict.fromkeys(line.part for line in lines):
        own = [line for line in lines if line.part == part]
        subject = "a fusion model" if part == "fusion" else "a dual encoder"
        said += [weighing(own, subject, adversarial, scorings=scorings, defences=defences), *ranking(own)]
    return " ".join(said)


def weighing(
    lines: Sequence[Line],
    subject: str,
    adversarial: Sequence[str],
    *,
    scorings: Mapping[str, str],
    defences: Mapping[str, str],
) -> str:
    """The weights with which most is left of text retrieval under the worst attack, beside the published ones."""
    worst = dict(worst_cases(lines, adversarial))
    if not worst:
        return f"Nothing attacked {subject}."
    defence, scoring, best = max(worst, key=lambda key: worst[key][0])
    others = {key[2]: found for key, found in worst.items() if key[:2] == (defence, scoring) and key[2] != best}
    kept = worst[defence, scoring, best]
    if kept[0] == 0:
        return f"Under its worst attack nothing is left of {subject}, whatever the weights: TR@1 {told(kept)} at most."
    said = (
        f"Under its worst attack, {subject} ({defences.get(defence, defence)}, ranked by {scorings[scoring]}) "
        f"keeps most at {best}, TR@1 {told(kept)}"
    )
    if not others:
        return f"{said}."
    beside = PUBLISHED if PUBLISHED in others else max(others, key=lambda weight: others[weight][0])
    below = [weight for weight in others if others[weight][2] < kept[1]]
    verdict = f"clearly less is left at {' and '.join(below)}" if below else "the weights differ inside the intervals"
    return f"{said} against {told(others[beside])} at {beside}; {verdict}."


def worst_cases(lines: Sequence[Line], adversarial: Sequence[str]) -> Iterator[tuple[tuple[str, str, str], Interval]]:
    """(defence, scoring, weight) and TR@1 under the attack that leaves least of it."""
    for key in dict.fromkeys((line.defence, line.scoring, line.weight) for line in lines):
        left = [
            value
            for line in lines
            if (line.defence, line.scoring, line.weight) == key and line.attack in adversarial
            if (value := line.values.get("tr@1")) is not None
        ]
        if left:
            yield key, min(left)


def ranking(lines: Sequence[Line]) -> Iterator[str]:
    """What an attack on contrast leaves of either ranking, in the model fine-tuned with the published weights."""
    found = {
        (line.attack, line.scoring): line.values.get("tr@1")
        for line in lines
        if line.defence == "finetune" and line.weight == PUBLISHED
    }
    clean = found.get(("none", "itc")), found.get(("none", "itm"))
    attacked = found.get(("itc", "itc")), found.get(("itc", "itm"))
    if clean[0] and clean[1] and attacked[0] and attacked[1]:
        yield (
            f"Fine-tuned at {PUBLISHED}, ranking by ITC has TR@1 {told(clean[0])} when clean and {told(attacked[0])} "
            f"under an attack on ITC, re-ranking by ITM {told(clean[1])} and {told(attacked[1])}."
        )


def told(estimate: Interval) -> str:
    """
    >>> told((50.0, 40.0, 60.25))
    '50.0 [40.0, 60.2]'
    """
    value, low, high = estimate
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
