"""One step of PGD in Linf and L2, of MI-FGSM, of FARE's PGD and of APGD, against the lines of their authors.

fastmat bench ops --only pgd
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmat.benchmarks import opponents
from fastmat.benchmarks.harness import Case, Implementation, Tensors, Work, can_compile
from fastmat.ops import apgd_step, momentum_step, pgd_step

EPS, STEP, DECAY, INERTIA = 8 / 255, 2 / 255, 0.9, 0.75
EPS_L2, STEP_L2 = 2.0, 0.5
# Passes over one fp32 image tensor that the kernels make (kernels/pgd.py).
OURS = {"linf": 4, "l2": 7, "momentum mi": 7, "momentum fare": 6, "apgd": 6}


def cases(device: torch.device, short: bool) -> list[Case]:
    sizes = [(2, 8)] if short else [(128, 224), (8, 224)]
    found = [case("pgd_step", "linf", linf, batch, side, device, short) for batch, side in sizes]
    batch, side = sizes[0]
    return [
        *found,
        case("pgd_step", "l2", l2, batch, side, device, short),
        case("momentum_step", "mi", momentum_mi, batch, side, device, short),
        case("momentum_step", "fare", momentum_fare, batch, side, device, short),
        case("apgd_step", "linf", apgd, batch, side, device, short),
    ]


def test_pgd(benchmark: Callable[[Callable[[], Tensors]], Tensors], micro: Callable[[], Tensors]) -> None:
    """With pytest-benchmark; see conftest.py."""
    benchmark(micro)


class Images:
    """Inputs of every case: clean images, an iterate inside the ball, a gradient, and states of the right signs.

    The velocity agrees with the gradient in sign, so that no rounding decides the sign of their sum.
    """

    def __init__(self, batch: int, side: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = (batch, 3, side, side)
        self.x0 = torch.rand(shape, generator=generator, device=device)
        self.grad = torch.randn(shape, generator=generator, device=device)
        self.x = (self.x0 + EPS * (2 * torch.rand(shape, generator=generator, device=device) - 1)).clamp_(0, 1)
        self.previous = (self.x0 + EPS * (2 * torch.rand(shape, generator=generator, device=device) - 1)).clamp_(0, 1)
        self.velocity = self.grad.sign() * torch.rand(shape, generator=generator, device=device)

    @property
    def bytes(self) -> int:
        return self.x.numel() * self.x.element_size()

    def copy(self) -> Implementation:
        target = torch.empty_like(self.x)
        return Implementation(name="copy", kind="limit", call=lambda: (target.copy_(self.x),), moved=2 * self.bytes)


def case(
    operator: str,
    name: str,
    build: Callable[[Images, bool], Work],
    batch: int,
    side: int,
    device: torch.device,
    short: bool,
) -> Case:
    compile_too = not short and can_compile(device)
    return Case(
        operator=operator,
        name=f"{name} B={batch} {side}px",
        shape={"images": batch, "side": side},
        dtype="float32",
        tolerance=2e-6,
        build=lambda: build(Images(batch, side, device), compile_too),
    )


def published(name: str, update: Callable[..., Tensor], *arguments: object, compiled: bool) -> list[Implementation]:
    """As it stands, and compiled."""
    found = [Implementation(name=name, kind="published", call=lambda: (update(*arguments),))]
    if compiled:
        fast = torch.compile(update, dynamic=False, fullgraph=True)
        found.append(Implementation(name=f"{name}, compiled", kind="tuned", call=lambda: (fast(*arguments),)))
    return found


def linf(images: Images, compiled: bool) -> Work:
    x, grad, x0 = images.x, images.grad, images.x0
    state, other = x.clone(), x.clone()
    low, high = (x0 - EPS).clamp_(min=0), (x0 + EPS).clamp_(max=1)
    sign = torch.empty_like(x)

    def ours() -> Tensors:
        return (pgd_step(state, grad, x0, eps=EPS, step_size=STEP, out=state),)

    def in_place() -> Tensors:
        """Buffers and bounds made once: 9 passes, 3 kernels."""
        other.add_(torch.sign(grad, out=sign), alpha=STEP)
        return (torch.clamp(other, low, high, out=other),)

    arguments = (x, grad, x0, EPS, STEP)
    return Work(
        lambda: (exact_linf(x.double(), grad, x0.double()).float(),),
        [
            Implementation(name="fastmat", kind="fastmat", call=ours, moved=OURS["linf"] * images.bytes),
            *published("torchattacks", opponents.torchattacks_pgd, *arguments, compiled=compiled),
            *published("SGA", opponents.sga, *arguments, compiled=False),
            Implementation(name="in place, eager", kind="tuned", call=in_place),
            images.copy(),
        ],
    )


def exact_linf(x: Tensor, direction: Tensor, x0: Tensor) -> Tensor:
    return clip(x + STEP * direction.sign(), x0)


def clip(x: Tensor, x0: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(x, x0 + EPS), x0 - EPS).clamp(0, 1)


def l2(images: Images, compiled: bool) -> Work:
    x, grad, x0 = images.x, images.grad, images.x0
    state = x.clone()

    def exact() -> Tensors:
        wide = grad.double()
        delta = x.double() + STEP_L2 * wide / wide.flatten(1).norm(dim=1)[:, None, None, None] - x0.double()
        length = delta.flatten(1).norm(dim=1)[:, None, None, None]
        return ((x0.double() + delta * (EPS_L2 / length).clamp(max=1)).clamp(0, 1).float(),)

    def ours() -> Tensors:
        return (pgd_step(state, grad, x0, eps=EPS_L2, step_size=STEP_L2, norm="l2", out=state),)

    return Work(
        exact,
        [
            Implementation(name="fastmat", kind="fastmat", call=ours, moved=OURS["l2"] * images.bytes),
            *published("torchattacks", opponents.torchattacks_pgdl2, x, grad, x0, EPS_L2, STEP_L2, compiled=compiled),
            images.copy(),
        ],
    )


def momentum_mi(images: Images, compiled: bool) -> Work:
    x, grad, x0, velocity = images.x, images.grad, images.x0, images.velocity
    state, own = x.clone(), velocity.clone()

    def ours() -> Tensors:
        return (momentum_step(state, own, grad, x0, eps=EPS, step_size=STEP, decay=DECAY, rule="mi", out=state),)

    def mifgsm(*arguments: Tensor) -> Tensor:
        return opponents.torchattacks_mifgsm(*arguments, EPS, STEP, DECAY)[0]

    return Work(
        lambda: (exact_linf(x.double(), grad, x0.double()).float(),),
        [
            Implementation(name="fastmat", kind="fastmat", call=ours, moved=OURS["momentum mi"] * images.bytes),
            *published("torchattacks", mifgsm, x, velocity, grad, x0, compiled=compiled),
            images.copy(),
        ],
    )


def momentum_fare(images: Images, compiled: bool) -> Work:
    x, grad, x0, velocity = images.x, images.grad, images.x0, images.velocity.sign()
    state, own, delta = x.clone(), velocity.clone(), x - x0

    def ours() -> Tensors:
        return (momentum_step(state, own, grad, x0, eps=EPS, step_size=STEP, decay=DECAY, rule="fare", out=state),)

    def with_checks() -> Tensors:
        return (opponents.fare(delta, velocity, grad, x0, EPS, STEP, DECAY)[0] + x0,)

    def unchecked(*arguments: Tensor) -> Tensor:
        return opponents.fare_unchecked(*arguments, EPS, STEP, DECAY)[0] + arguments[-1]

    found = published("FARE", unchecked, delta, velocity, grad, x0, compiled=compiled)
    return Work(
        lambda: (exact_linf(x.double(), grad, x0.double()).float(),),
        [
            Implementation(name="fastmat", kind="fastmat", call=ours, moved=OURS["momentum fare"] * images.bytes),
            Implementation(name="FARE", kind="published", call=with_checks),
            *found[1:],
            images.copy(),
        ],
    )


def apgd(images: Images, compiled: bool) -> Work:
    x, grad, x0, previous = images.x, images.grad, images.x0, images.previous
    state, own = x.clone(), previous.clone()
    each = torch.full((len(x),), STEP, device=x.device)

    def exact() -> Tensors:
        wide, clean = x.double(), x0.double()
        moved = wide + INERTIA * (exact_linf(wide, grad, clean) - wide) + (1 - INERTIA) * (wide - previous.double())
        return (clip(moved, clean).float(),)

    def ours() -> Tensors:
        return (apgd_step(state, own, grad, x0, eps=EPS, step_size=each, inertia=INERTIA, out=state),)

    def autoattack(*arguments: Tensor) -> Tensor:
        return opponents.apgd(*arguments, EPS, each[:, None, None, None], INERTIA)[0]

    return Work(
        exact,
        [
            Implementation(name="fastmat", kind="fastmat", call=ours, moved=OURS["apgd"] * images.bytes),
            *published("AutoAttack", autoattack, x, previous, grad, x0, compiled=compiled),
            images.copy(),
        ],
    )
