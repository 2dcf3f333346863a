"""SGA's five views with noise, forward and backward, against its loop over torchvision's resize.

fastmat bench ops --only views
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode, Resize

from fastmat.benchmarks.harness import Case, Implementation, Kind, Tensors, Work
from fastmat.ops import normal_noise, scale_views

SCALES, STD = (0.5, 0.75, 1.25, 1.5), 0.05
Draw = Callable[[int], Tensor]  # noise of the i-th scale, [B, 3, H, W]
Views = Callable[[Tensor, Draw], Tensor]


def cases(device: torch.device, short: bool) -> list[Case]:
    batch, side = (2, 16) if short else (8, 384)
    return [
        Case(
            operator="scale_views",
            name=f"{'antialias' if antialias else 'no antialias'} B={batch} {side}px",
            shape={"images": batch, "side": side, "views": 1 + len(SCALES), "antialias": antialias},
            dtype="float32",
            tolerance=5e-5 if device.type == "cpu" else 2e-3,  # fp32 sampling weights alone are off by 2e-5
            build=partial(build, batch, side, antialias, device),
            repeatable=True,
        )
        for antialias in (True, False)
    ]


def test_views(benchmark: Callable[[Callable[[], Tensors]], Tensors], micro: Callable[[], Tensors]) -> None:
    """With pytest-benchmark; see conftest.py."""
    benchmark(micro)


def build(batch: int, side: int, antialias: bool, device: torch.device) -> Work:
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, 3, side, side)
    # Values stay clear of the box, but for two patches far outside it: hardly a pixel is so near the edge that rounding
    # decides whether its gradient passes.
    x = (0.4 + 0.2 * torch.rand(shape, generator=generator, device=device)).requires_grad_()
    noise = STD * torch.randn(len(SCALES), *shape, generator=generator, device=device).clamp_(-2, 2)
    noise[:, 0, 0, : side // 8, : side // 8] += 3.0
    noise[:, 1, 1, side // 2 : side // 2 + side // 8, : side // 8] -= 3.0
    upstream = torch.randn((1 + len(SCALES)) * batch, 3, side, side, generator=generator, device=device)
    index = torch.arange(batch, device=device)
    draws = iter(range(1 << 40))

    def with_gradient(views: Callable[[Tensor], Tensor]) -> Callable[[], Tensors]:
        def call() -> Tensors:
            made = views(x)
            return made.detach(), *torch.autograd.grad(made, x, upstream)

        return call

    def ours(noise: Tensor, x: Tensor) -> Tensor:
        return torch.cat([x, scale_views(x, SCALES, noise, antialias=antialias).flatten(0, 1)])

    def ours_drawn(x: Tensor) -> Tensor:
        drawn = [normal_noise(next(draws), index, x.shape[1:]) for _ in SCALES]
        return ours(torch.stack(drawn).mul_(STD), x)

    def opponent(name: str, kind: Kind, views: Callable[..., Tensor], draw: Draw) -> Implementation:
        return Implementation(
            name=name,
            kind=kind,
            call=with_gradient(partial(views, draw=draw, antialias=antialias)),
            check=with_gradient(partial(views, draw=lambda i: noise[i].clone(), antialias=antialias)),
        )

    def on_host(i: int) -> Tensor:
        return torch.from_numpy(np.random.normal(0.0, STD, shape)).float().to(device)  # noqa: NPY002, the published draw

    def on_device(i: int) -> Tensor:
        return torch.empty(shape, device=device).normal_(0.0, STD)

    def exact() -> Tensors:
        wide = x.detach().double().requires_grad_()
        made = interpolated(wide, draw=lambda i: noise[i].double(), antialias=antialias)
        return made.detach(), *torch.autograd.grad(made, wide, upstream.double())

    return Work(
        exact,
        [
            Implementation(
                name="fastmat",
                kind="fastmat",
                call=with_gradient(ours_drawn),
                check=with_gradient(partial(ours, noise)),
            ),
            opponent("SGA", "published", sga, on_host),
            opponent("device noise, interpolate", "tuned", interpolated, on_device),
        ],
    )


def sga(x: Tensor, draw: Draw, antialias: bool) -> Tensor:
    """attacker.py, ImageAttacker.get_scaled_imgs (Zoky-2020/SGA, f49e692), antialiasing made explicit."""
    side = tuple(x.shape[-2:])
    back = Resize(side, interpolation=InterpolationMode.BICUBIC, antialias=antialias)
    found = [x]
    for i, scale in enumerate(SCALES):
        small = (int(scale * side[0]), int(scale * side[1]))
        there = Resize(small, interpolation=InterpolationMode.BICUBIC, antialias=antialias)
        found.append(back(torch.clamp(there(x + draw(i)), 0.0, 1.0)))
    return torch.cat(found, 0)


def interpolated(x: Tensor, draw: Draw, antialias: bool) -> Tensor:
    """The same without torchvision, and the sum in the memory of the noise, which `draw` must give away."""
    resize = partial(F.interpolate, mode="bicubic", antialias=antialias)
    found = [x]
    for i, scale in enumerate(SCALES):
        small = [int(scale * side) for side in x.shape[-2:]]
        found.append(resize(resize(draw(i).add_(x), size=small).clamp(0, 1), size=x.shape[-2:]))
    return torch.cat(found)
