"""Before any figure: does a step do what the plain loop's does, from the same weights, batch and draws?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from fastmat.benchmarks.attacks.gate import AGREEMENT, MARGIN, ORDER, objective_off
from fastmat.benchmarks.harness import QualityError
from fastmat.benchmarks.train.job import Contestant, Stepped

LOSS = 0.01
PIXELS = 0.98  # rounding turns signs of small gradients
GRADIENT = 0.05
MADE = 0.05  # in 16 bits


class Seen(NamedTuple):
    """A step, the gradients, by parameter, that its update was made of, and [B] losses of what it made, in fp32."""

    stepped: Stepped
    gradients: Mapping[str, Tensor]
    values: Tensor


@contextmanager
def gradients_of(model: nn.Module, optimizer: Optimizer) -> Iterator[dict[str, Tensor]]:
    """What the optimiser finds at its next step, kept in fp32."""
    found: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def keep(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            found.update({names[id(p)]: p.grad.float().clone() for p in group["params"] if p.grad is not None})

    handle = optimizer.register_step_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def compare(who: Contestant, got: Seen, plain: Seen, *, clean: Tensor, title: str) -> dict[str, float]:
    """How `got` differs from the plain loop's step. Raises QualityError where it is another step.

    fp32: the same text wherever the published choice was clear, 98 % of the pixels, loss within 1 %, gradient within
    5 %. 16 bits: 98 % of the texts (one caption always may differ), and the loss, in fp32, of what was made within 5 %
    (or two standard errors) of its value or of its gain over `clean` [B]; loss and gradient as computed are reported.
    """
    theirs, ours = plain.stepped, got.stepped
    count = len(theirs.texts)
    differ = {t for t, (a, b) in enumerate(zip(ours.texts, theirs.texts, strict=True)) if a != b}
    unclear: set[int] = set()
    if (trace := theirs.trace) is not None:
        unclear = {t for t in range(count) if trace.margin[t] <= MARGIN or trace.order[t] <= ORDER}
    made_off, error = objective_off(got.values, plain.values, clean)
    found = {
        "agreement": 1 - len(differ) / count,
        "unclear": float(len(unclear)),
        "pixels": float(((ours.images - theirs.images).abs() < 1e-6).float().mean()),
        "loss_off": abs(float(ours.loss) - float(theirs.loss)) / max(abs(float(theirs.loss)), 1e-12),
        "made_off": made_off,
        "made_error": error,
        "gradient_off": gradient_off(got.gradients, plain.gradients),
    }
    exact = who.dtype == "float32"
    wrong = None
    if exact and differ - unclear:
        first = ours.texts[min(differ - unclear)]
        wrong = f"{len(differ - unclear)} texts differ although the published choice is clear, first: {first!r}"
    elif not exact and len(differ) > max(1, (1 - AGREEMENT) * count):
        wrong = f"only {found['agreement']:.1%} of the texts agree with fp32"
    elif exact and not differ and not found["pixels"] >= PIXELS:
        wrong = f"only {found['pixels']:.1%} of the pixels agree"
    elif exact and not found["loss_off"] <= LOSS:  # so that NaN is wrong
        wrong = f"the loss is {found['loss_off']:.1%} off"
    elif exact and not differ and not found["gradient_off"] <= GRADIENT:
        wrong = f"the gradient is {found['gradient_off']:.1%} off"
    elif not exact and not (made_off <= max(MADE, 2 * error) and isfinite(found["loss_off"] + found["gradient_off"])):
        wrong = f"what it made has a loss that is {made_off:.1%} off, of which {2 * error:.1%} may be chance"
    if wrong is not None:
        raise QualityError(f"{title}, {who.kind} {who.dtype}: {wrong}; it is not timed")
    return found


def gradient_off(got: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> float:
    """|got - plain| / |plain| over all parameters that `got` trains; infinite where `plain` lacks one, or `got` all.

    >>> gradient_off({"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([3.0, 4.0]), "other": torch.ones(1)})
    0.8
    """
    if not got or not got.keys() <= plain.keys():
        return float("inf")
    off = sum(float((got[name] - plain[name]).double().square().sum()) for name in got)
    length = sum(float(plain[name].double().square().sum()) for name in got)
    return (off / max(length, 1e-30)) ** 0.5
