"""Before any figure: does a step do what the plain loop's does, from the same weights, batch and draws?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf, isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastmat.benchmarks.attacks.gate import AGREEMENT, MARGIN, ORDER, objective_off
from fastmat.benchmarks.harness import QualityError
from fastmat.benchmarks.train.job import Contestant, Job, Stepped

MADE, MADE_LOW = 0.01, 0.05  # in fp32 and in 16 bits
REPEATED = 1e-3  # of loss and gradient, in fp32


class Seen(NamedTuple):
    """A step, the gradients, by parameter, that its update was made of, and [B] losses of what it made, in fp32.

    own_loss, own_gradients: what the plain loop's outer step finds at the images and texts that this step made.
    """

    stepped: Stepped
    gradients: Mapping[str, Tensor]
    values: Tensor
    own_loss: float
    own_gradients: Mapping[str, Tensor]


def see(job: Job, stepped: Stepped, gradients: Mapping[str, Tensor]) -> Seen:
    """`stepped` and the gradients found in it, with the plain loop's view of what it made."""
    weights = {name: weight for name, weight in job.model.named_parameters() if name in gradients}
    loss = job.loss(stepped)
    own = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    found = {name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(weights.items(), own, strict=True)}
    return Seen(stepped, gradients, job.values(stepped), float(loss.detach()), found)


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

    What a step makes: rounding turns the signs of small gradients, and ten sign steps make other pixels of them, in the
    published loop itself as soon as a convolution is computed in another way. So images are compared by the loss that
    they reach, in fp32: within 1 % of its value or of its gain over `clean` [B], or two standard errors. Texts must be
    the same wherever the published choice was clear. What a step does with them: its loss and gradient must be those,
    to a thousandth, that the plain loop finds at the same images and texts. Pixels are reported.
    16 bits: 98 % of the texts (one caption always may differ), the loss reached within 5 %; the rest is reported.
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
        "loss_off": abs(float(ours.loss) - got.own_loss) / max(abs(got.own_loss), 1e-12),
        "made_off": made_off,
        "made_error": error,
        "gradient_off": gradient_off(got.gradients, got.own_gradients),
    }
    exact = who.dtype == "float32"
    wrong = None
    if exact and differ - unclear:
        first = ours.texts[min(differ - unclear)]
        wrong = f"{len(differ - unclear)} texts differ although the published choice is clear, first: {first!r}"
    elif not exact and len(differ) > max(1, (1 - AGREEMENT) * count):
        wrong = f"only {found['agreement']:.1%} of the texts agree with fp32"
    elif not made_off <= max(MADE if exact else MADE_LOW, 2 * error):  # so that NaN is wrong
        wrong = f"what it made has a loss that is {made_off:.1%} off, of which {2 * error:.1%} may be chance"
    elif not found["loss_off"] <= (REPEATED if exact else inf) or not isfinite(found["loss_off"]):
        wrong = f"the loss is {found['loss_off']:.2%} off"
    elif not found["gradient_off"] <= (REPEATED if exact else inf) or not isfinite(found["gradient_off"]):
        wrong = f"the gradient is {found['gradient_off']:.2%} off"
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
