"""Random starts and noise, against the draws of published attacks and PyTorch's own.

fastmat bench ops --only start
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count

import numpy as np
import torch
from torch import Tensor

from fastmat.benchmarks.harness import Case, Implementation, Kind, Tensors, Work
from fastmat.ops import normal_noise, random_start, uniform_noise

EPS = 8 / 255
UNIFORM, NORMAL = (0.0, 1 / 3, 0.0, 1 / 5), (0.0, 1.0, 0.0, 3.0)  # the first four moments


def cases(device: torch.device, short: bool) -> list[Case]:
    batch, side = (2, 32) if short else (128, 224)
    return [
        Case(
            operator=operator,
            name=f"B={batch} {side}px",
            shape={"images": batch, "side": side},
            dtype="float32",
            # Everybody draws other numbers, so the gate compares moments: this is six standard errors of the noisiest,
            # the fourth of a normal.
            tolerance=20 * (batch * 3 * side**2) ** -0.5,
            build=partial(build, (batch, 3, side, side), device),
        )
        for operator, build in (("random_start", start), ("uniform_noise", uniform), ("normal_noise", normal))
    ]


def test_start(benchmark: Callable[[Callable[[], Tensors]], Tensors], micro: Callable[[], Tensors]) -> None:
    """With pytest-benchmark; see conftest.py."""
    benchmark(micro)


def start(shape: tuple[int, ...], device: torch.device) -> Work:
    x0 = torch.full(shape, 0.5, device=device)  # far from the box, so that no moment is clamped
    seeds, index = count(), torch.arange(len(x0), device=device)

    def torchattacks() -> Tensor:
        """torchattacks/attacks/pgd.py, PGD.forward (Harry24k/adversarial-attacks-pytorch, 23620a6)."""
        x = x0.clone()
        return torch.clamp(x + torch.empty_like(x).uniform_(-EPS, EPS), min=0, max=1)

    def sga() -> Tensor:
        """attacker.py, ImageAttacker.txt_guided_attack (Zoky-2020/SGA, f49e692)."""
        return torch.clamp(x0 + on_host(np.random.uniform(-EPS, EPS, shape), device), 0.0, 1.0)  # noqa: NPY002

    def in_place() -> Tensor:
        return torch.empty_like(x0).uniform_(-EPS, EPS).add_(x0).clamp_(0, 1)

    moments = partial(moments_of, center=0.5, scale=EPS)
    return Work(
        lambda: (torch.tensor(UNIFORM),),
        [
            drawn("fastmat", "fastmat", lambda: random_start(x0, eps=EPS, seed=next(seeds), index=index), moments),
            drawn("torchattacks", "published", torchattacks, moments),
            drawn("SGA", "published", sga, moments),
            drawn("in place", "tuned", in_place, moments),
        ],
    )


def uniform(shape: tuple[int, ...], device: torch.device) -> Work:
    seeds, index = count(), torch.arange(shape[0], device=device)
    return Work(
        lambda: (torch.tensor(UNIFORM),),
        [
            drawn("fastmat", "fastmat", lambda: uniform_noise(next(seeds), index, shape[1:])),
            # As SGA's start, above.
            drawn("NumPy, copied", "published", lambda: on_host(np.random.uniform(-1.0, 1.0, shape), device)),  # noqa: NPY002
            drawn("uniform_", "tuned", lambda: torch.empty(shape, device=device).uniform_(-1, 1)),
        ],
    )


def normal(shape: tuple[int, ...], device: torch.device) -> Work:
    seeds, index = count(), torch.arange(shape[0], device=device)
    return Work(
        lambda: (torch.tensor(NORMAL),),
        [
            drawn("fastmat", "fastmat", lambda: normal_noise(next(seeds), index, shape[1:])),
            # As ImageAttacker.get_scaled_imgs of SGA, for its views.
            drawn("NumPy, copied", "published", lambda: on_host(np.random.normal(0.0, 1.0, shape), device)),  # noqa: NPY002
            drawn("normal_", "tuned", lambda: torch.empty(shape, device=device).normal_()),
        ],
    )


def on_host(values: np.ndarray, device: torch.device) -> Tensor:
    """float64 draws of the host's one generator, narrowed, then copied: SGA's way."""
    return torch.from_numpy(values).float().to(device)


def moments_of(draws: Tensor, *, center: float = 0.0, scale: float = 1.0) -> Tensor:
    """[4] the means of the first four powers of (draws - center) / scale.

    >>> moments_of(torch.tensor([0.0, 2.0])).tolist()
    [1.0, 2.0, 4.0, 8.0]
    """
    unit = (draws.double() - center) / scale
    return torch.stack([unit.pow(power).mean() for power in (1, 2, 3, 4)]).cpu()


def drawn(
    name: str, kind: Kind, draw: Callable[[], Tensor], moments: Callable[[Tensor], Tensor] = moments_of
) -> Implementation:
    return Implementation(name=name, kind=kind, call=lambda: (draw(),), check=lambda: (moments(draw()),))
