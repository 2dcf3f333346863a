"""How far an attack moves features apart from the clean ones, channel by channel: pure functions of paired features.

clean, adversarial: [N, C], row i of both the same input before and after the attack. What "explained" says decides what
a correction can do: a constant map removes no more of the shift than `explained_by_shift`, one scale and one shift per
channel no more than `explained_by_affine`, both on the pairs it was made for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Interval = tuple[float, float, float]

ACTIVE = 0.01  # of a row's largest value: the threshold of CAS (Bai et al., ICLR 2021, section 3.1)


def mean_shift(clean: Tensor, adversarial: Tensor) -> Tensor:
    """[C]: |mean after - mean before| in clean standard deviations; NaN in a channel that is constant when clean.

    >>> mean_shift(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([[1.0, 1.0], [4.0, 1.0]])).tolist()
    [1.5, nan]
    """
    return standardised((adversarial.mean(0) - clean.mean(0)).abs(), clean)


def wasserstein(clean: Tensor, adversarial: Tensor) -> Tensor:
    """[C]: the 1-Wasserstein distance of each channel's two empirical distributions, in clean standard deviations.

    With equally many values on both sides it is the mean distance of the sorted values. Pairing plays no part.

    >>> wasserstein(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [0.0]])).tolist()
    [0.5]
    """
    return standardised((adversarial.sort(0).values - clean.sort(0).values).abs().mean(0), clean)


def standardised(distance: Tensor, clean: Tensor) -> Tensor:
    deviation = clean.std(0, correction=0)
    return torch.where(deviation > 0, distance / deviation, torch.nan)


def activation_frequency(features: Tensor) -> Tensor:
    """[C]: in what share of the rows a channel exceeds 1 % of the row's largest value (CAS).

    >>> activation_frequency(torch.tensor([[100.0, 2.0, 0.5], [100.0, 0.0, 0.0]])).tolist()
    [1.0, 0.5, 0.0]
    """
    return (features > ACTIVE * features.amax(1, keepdim=True)).to(features.dtype).mean(0)


def uniformity(frequency: Tensor) -> float:
    """How evenly channels are used: entropy of the frequencies over its maximum, in [0, 1]; this project's measure of
    what CAS draws. NaN where no channel is active, or there is one alone.

    >>> uniformity(torch.tensor([0.5, 0.5])), uniformity(torch.tensor([1.0, 0.0]))
    (1.0, 0.0)
    """
    if len(frequency) < 2 or not bool(frequency.sum() > 0):
        return math.nan
    share = frequency.double() / frequency.double().sum()
    return float(torch.special.entr(share).sum() / math.log(len(share)))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two [C] orders, ties at their mean rank; NaN where one of them is constant.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 30.0, 20.0]))
    0.5
    """
    x, y = (ranks - ranks.mean() for ranks in map(mean_ranks, (a, b)))
    below = math.sqrt(float((x @ x) * (y @ y)))
    return float(x @ y) / below if below > 0 else math.nan


def mean_ranks(values: Tensor) -> Tensor:
    """[C] float64 ranks from 0; equal values share the mean of theirs."""
    smaller = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return smaller.double() + (equal.double() - 1) / 2


def explained_by_shift(clean: Tensor, adversarial: Tensor) -> float:
    """R^2: the share of sum |z' - z|^2 that one constant vector, the mean shift, removes. NaN where nothing moved.

    >>> explained_by_shift(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]))
    0.8
    """
    shift = (adversarial - clean).double()
    return ratio(len(shift) * shift.mean(0).square().sum(), shift.square().sum())


def explained_by_affine(clean: Tensor, adversarial: Tensor) -> float:
    """The share of sum |z' - z|^2 that the best scale and shift of every channel remove, by least squares.

    >>> explained_by_affine(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[3.0], [5.0], [9.0]]))
    1.0
    """
    x, y = (features.double() - features.double().mean(0) for features in (adversarial, clean))
    across, within = (x * y).sum(0), x.square().sum(0)
    left = y.square().sum(0) - torch.where(within > 0, across.square() / within, 0.0)
    moved = (adversarial - clean).double().square().sum()
    return ratio(moved - left.clamp_min(0).sum(), moved)


def ratio(part: Tensor, whole: Tensor) -> float:
    return round(float(part / whole), 12) if bool(whole > 0) else math.nan


def shift_interval(clean: Tensor, adversarial: Tensor) -> Interval:
    """`explained_by_shift` with its 95 % jackknife interval over rows, within [0, 1].

    Not a bootstrap: a mean of rows drawn with replacement is longer than that of the rows, so its intervals lie above.

    >>> shift_interval(torch.zeros(3, 1), torch.ones(3, 1))
    (1.0, 1.0, 1.0)
    """
    shift = (adversarial - clean).double()
    n, value = len(shift), explained_by_shift(clean, adversarial)
    if math.isnan(value) or n < 2:
        return value, 0.0, 1.0
    moved = shift.square().sum(1)
    left = (moved.sum() - moved).clamp_min(torch.finfo(moved.dtype).tiny)
    without = (shift.sum(0) - shift).square().sum(1) / (n - 1) / left
    spread = 1.96 * math.sqrt((n - 1) / n * float((without - without.mean()).square().sum()))
    return value, max(0.0, round(value - spread, 12)), min(1.0, round(value + spread, 12))


@dataclass(frozen=True, kw_only=True)
class Misalignment:
    """One layer under one attack. Of each per-channel measure the mean over channels that are not constant;
    `by_channel` [C] is the standardised mean shift. The rank correlation is that of the channels' mean values."""

    channels: int
    explained_by_shift: Interval
    explained_by_affine: float
    mean_shift: float
    wasserstein: float
    uniformity_clean: float
    uniformity_adversarial: float
    rank_correlation: float
    by_channel: tuple[float, ...]


def measure(clean: Tensor, adversarial: Tensor) -> Misalignment:
    """All of it. clean, adversarial: [N, C]."""
    by_channel = mean_shift(clean, adversarial)
    return Misalignment(
        channels=clean.shape[1],
        explained_by_shift=shift_interval(clean, adversarial),
        explained_by_affine=explained_by_affine(clean, adversarial),
        mean_shift=float(by_channel.nanmean()),
        wasserstein=float(wasserstein(clean, adversarial).nanmean()),
        uniformity_clean=uniformity(activation_frequency(clean)),
        uniformity_adversarial=uniformity(activation_frequency(adversarial)),
        rank_correlation=rank_correlation(clean.mean(0), adversarial.mean(0)),
        by_channel=tuple(by_channel.tolist()),
    )
