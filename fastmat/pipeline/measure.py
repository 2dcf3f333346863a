"""How much of what was said of pictures is another after an attack; pure functions, in percent."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fastmat.tasks.base import Metric, mean, share


def normalised(answer: str | None) -> str:
    """Words and numbers alone, in lower case: what is compared. No answer is an empty one.

    >>> normalised(' A dog, in the  snow!'), normalised(None)
    ('a dog in the snow', '')
    """
    return " ".join(re.findall(r"\w+", (answer or "").casefold()))


def differ(before: Sequence[str | None], after: Sequence[str | None]) -> Tensor:
    """[N] bool: which of the answers to the same questions are not the same after normalisation.

    >>> differ(["A dog.", "left"], ["a dog", "right"]).tolist()
    [False, True]
    """
    pairs = zip(before, after, strict=True)
    return torch.tensor([normalised(first) != normalised(second) for first, second in pairs], dtype=torch.bool)


def expert_metrics(
    before: Sequence[str | None], after: Sequence[str | None], captions: Sequence[Collection[str]] | None
) -> dict[str, Metric]:
    """ "changed": answers that are others after the attack. captions: per picture, what a retrieved caption may be to
    be right; with them also "right_clean", "right", and "asr": of those right when clean, the share wrong after it.

    >>> metrics = expert_metrics(["a dog"], ["a cat"], [{"a dog"}])
    >>> [f"{name} {float(metric.value(metric.sums.sum(0))):.0f}" for name, metric in metrics.items()]
    ['changed 100', 'right_clean 100', 'right 0', 'asr 100']
    """
    metrics = {"changed": share(differ(before, after))}
    if captions is None:
        return metrics
    was, is_now = (
        torch.tensor([answer in own for answer, own in zip(told, captions, strict=True)], dtype=torch.bool)
        for told in (before, after)
    )
    return metrics | {"right_clean": share(was), "right": share(is_now), "asr": share(was & ~is_now, was)}


def agent_metrics(
    before: Sequence[str | None], after: Sequence[str | None], again: Sequence[str | None] | None
) -> dict[str, Metric]:
    """ "changed"; "unanswered_clean" and "unanswered": questions that the agent left without an answer; and "noise":
    answers that are others when the same is asked `again` of clean pictures, since a language model may not repeat
    itself even at temperature 0."""
    metrics = {"changed": share(differ(before, after))}
    for name, told in (("unanswered_clean", before), ("unanswered", after)):
        metrics[name] = share(torch.tensor([not normalised(answer) for answer in told], dtype=torch.bool))
    return metrics if again is None else metrics | {"noise": share(differ(before, again))}


def fewer(reference: Tensor, changed: Tensor) -> Metric:
    """Percentage points by which fewer answers change than with another set of experts, [N] bool each, of the same
    pictures: paired, so that its interval is that of the difference."""
    return mean(reference.double() - changed.double())
