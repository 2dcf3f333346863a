"""One iteration of the update of published attacks, as the tensor operations that each of them runs.

Written anew from reading, one operation for one operation, so that kernels and memory passes are theirs; the test of
`PUBLISHED` holds them to the counts of the originals. All ascend; x, grad, x0 and states are [B, 3, H, W] fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmat.benchmarks.passes import Count


def torchattacks_pgd(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float) -> Tensor:
    """torchattacks/attacks/pgd.py, PGD.forward (Harry24k/adversarial-attacks-pytorch, 23620a6)."""
    x = x + step_size * grad.sign()
    delta = torch.clamp(x - x0, -eps, eps)
    return torch.clamp(x0 + delta, 0, 1)


def torchattacks_pgdl2(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float) -> Tensor:
    """torchattacks/attacks/pgdl2.py, PGDL2.forward (same revision)."""
    length = torch.norm(grad.view(len(x), -1), p=2, dim=1) + 1e-10
    x = x + step_size * (grad / length.view(-1, 1, 1, 1))
    delta = x - x0
    length = torch.norm(delta.view(len(x), -1), p=2, dim=1)
    factor = torch.min(eps / length, torch.ones_like(length))
    return torch.clamp(x0 + delta * factor.view(-1, 1, 1, 1), 0, 1)


def torchattacks_mifgsm(
    x: Tensor, velocity: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float, decay: float
) -> tuple[Tensor, Tensor]:
    """torchattacks/attacks/mifgsm.py, MIFGSM.forward (same revision): image and velocity."""
    grad = grad / torch.mean(torch.abs(grad), dim=(1, 2, 3), keepdim=True)
    velocity = grad + velocity * decay
    return torchattacks_pgd(x, velocity, x0, eps, step_size), velocity


def sga(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float) -> Tensor:
    """attacker.py, ImageAttacker.txt_guided_attack (Zoky-2020/SGA, f49e692); the division leaves the sign as it was."""
    grad = grad / torch.mean(torch.abs(grad), dim=(1, 2, 3), keepdim=True)
    x = x + step_size * grad.sign()
    x = torch.min(torch.max(x, x0 - eps), x0 + eps)
    return torch.clamp(x, 0.0, 1.0)


def co_attack(delta: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float) -> Tensor:
    """attack/imageAttack.py, ImageAttacker.attack and get_grad (adversarial-for-goodness/Co-Attack, 96f2c0e): delta."""
    delta = delta + step_size * torch.sign(grad.clone())
    delta = torch.clamp(delta, -eps, eps)
    return torch.clamp(x0 + delta, 0, 1) - x0


def tecoa(delta: Tensor, accumulated: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float) -> Tensor:
    """finetuning.py, attack_pgd and clamp (cvlab-columbia/ZSRobust4FoundationModel, 1243db6): the image.

    `backward()` adds the gradient to delta.grad (`accumulated`), which is zeroed at the end, and the model's input is
    formed from delta: both belong to this way of writing the update, and to its count.
    """
    image = x0 + delta
    accumulated.add_(grad)
    moved = torch.clamp(delta + step_size * torch.sign(accumulated), -eps, eps)
    moved = torch.max(torch.min(moved, 1 - x0), 0 - x0)
    delta.copy_(moved)
    accumulated.zero_()
    return image


def fare(
    delta: Tensor, velocity: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float, decay: float
) -> tuple[Tensor, Tensor]:
    """train/pgd_train.py, pgd (chs20/RobustVLM, 7de10ee), with its four checks that wait for the result."""
    if grad.isnan().any():
        grad = grad.nan_to_num(nan=0.0)
    delta, velocity = fare_unchecked(delta, velocity, grad, x0, eps, step_size, decay)
    if delta.isnan().any() or torch.max(x0 + delta) >= 1 + 1e-6 or torch.min(x0 + delta) <= -1e-6:
        raise AssertionError("outside the box")
    return delta, velocity


def fare_unchecked(
    delta: Tensor, velocity: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float, decay: float
) -> tuple[Tensor, Tensor]:
    """`fare` without its checks."""
    velocity = torch.sign(decay * velocity + torch.sign(grad))
    delta = torch.clamp(delta + step_size * velocity, -eps, eps)
    return torch.clamp(x0 + delta, 0, 1) - x0, velocity


def apgd(
    x: Tensor, previous: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: Tensor, inertia: float
) -> tuple[Tensor, Tensor]:
    """autoattack/autopgd_base.py, APGDAttack.attack_single_run (fra31/auto-attack, a392200): the image and x.

    step_size [B, 1, 1, 1].
    """
    momentum = x - previous
    previous = x.clone()
    z = x + step_size * torch.sign(grad)
    z = torch.clamp(torch.min(torch.max(z, x0 - eps), x0 + eps), 0.0, 1.0)
    z = x + (z - x) * inertia + momentum * (1 - inertia)
    z = torch.clamp(torch.min(torch.max(z, x0 - eps), x0 + eps), 0.0, 1.0)
    return z + 0.0, previous


def apgd_keeping_best(
    x: Tensor,
    previous: Tensor,
    grad: Tensor,
    x0: Tensor,
    eps: float,
    step_size: Tensor,
    inertia: float,
    best: Tensor,
    fooled: Tensor,
) -> tuple[Tensor, Tensor]:
    """`apgd`, then the images that fool the model (int64 indices) are kept in `best`, as the same function does."""
    x, previous = apgd(x, previous, grad, x0, eps, step_size, inertia)
    best[fooled] = x[fooled] + 0.0
    return x, previous


def published(images: Tensor) -> dict[str, Callable[[], object]]:
    """Every update above on a batch of the shape of `images`, ready to be counted."""
    x0 = images
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(x0.shape, generator=generator)
    x = (x0 + 0.01 * torch.randn(x0.shape, generator=generator)).clamp(0, 1)
    delta, zero, best = x - x0, torch.zeros_like(x0), x0.clone()
    eps, step = 8 / 255, 2 / 255
    each = torch.full((len(x0), 1, 1, 1), step)
    few = torch.zeros(1, dtype=torch.int64)
    return {
        "torchattacks PGD": lambda: torchattacks_pgd(x, grad, x0, eps, step),
        "torchattacks PGDL2": lambda: torchattacks_pgdl2(x, grad, x0, eps, step),
        "SGA": lambda: sga(x, grad, x0, eps, step),
        "FARE": lambda: fare(delta, zero, grad, x0, eps, step, 0.9),
        "TeCoA": lambda: tecoa(delta, zero, grad, x0, eps, step),
        "Co-Attack": lambda: co_attack(delta, grad, x0, eps, step),
        "APGD": lambda: apgd_keeping_best(x, x, grad, x0, eps, each, 0.75, best, few),
    }


# Of the originals. FARE: the statements of its file dispatch 20 kernels; a 21st, on a number, has also been reported.
PUBLISHED = {
    "torchattacks PGD": Count(7, 17),
    "torchattacks PGDL2": Count(14, 19),
    "SGA": Count(11, 24),
    "FARE": Count(20, 35),
    "TeCoA": Count(12, 28),
    "Co-Attack": Count(8, 19),
    "APGD": Count(24, 53),
}
