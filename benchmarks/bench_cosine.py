"""SGA's linear objective with its gradient, against the labelled matrix of its authors.

fastmat bench ops --only cosine
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.benchmarks.harness import Case, Implementation, Tensors, Work
from fastmat.ops import cosine_to_set

WIDTH, CAPTIONS = 512, 5
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device: torch.device, short: bool) -> list[Case]:
    return [
        Case(
            operator="cosine_to_set",
            name=f"B={images} T={images * CAPTIONS}",
            shape={"images": images, "captions": images * CAPTIONS, "width": WIDTH},
            dtype="float32",
            tolerance=1e-5,
            build=partial(build, images, device),
        )
        for images in ((3,) if short else (8, 1024))
    ]


def test_cosine(benchmark: Callable[[Callable[[], Tensors]], Tensors], micro: Callable[[], Tensors]) -> None:
    """With pytest-benchmark; see conftest.py."""
    benchmark(micro)


def build(count: int, device: torch.device) -> Work:
    generator = torch.Generator(device).manual_seed(0)
    images = F.normalize(torch.randn(count, WIDTH, generator=generator, device=device), dim=1).requires_grad_()
    texts = F.normalize(torch.randn(count * CAPTIONS, WIDTH, generator=generator, device=device), dim=1)
    txt2img = torch.arange(count, device=device).repeat_interleave(CAPTIONS)

    def with_gradient(objective: Objective) -> Callable[[], Tensors]:
        def call() -> Tensors:
            value = objective(images, texts, txt2img)
            return value.detach(), *torch.autograd.grad(value.sum(), images)

        return call

    def exact() -> Tensors:
        seed = texts.double().view(count, CAPTIONS, WIDTH).sum(1)
        return (images.detach() * seed).sum(1), seed

    return Work(
        exact,
        [
            Implementation(name="fastmat", kind="fastmat", call=with_gradient(cosine_to_set)),
            Implementation(name="SGA", kind="published", call=with_gradient(sga)),
            Implementation(name="mask, no loop", kind="tuned", call=with_gradient(masked)),
        ],
    )


def sga(images: Tensor, texts: Tensor, txt2img: Tensor) -> Tensor:
    """attacker.py, ImageAttacker.loss_func (Zoky-2020/SGA, f49e692), before its mean: one assignment per caption."""
    similarity = images @ texts.T
    labels = torch.zeros(similarity.shape).to(images.device)
    for i in range(len(txt2img)):
        labels[txt2img[i], i] = 1
    return (similarity * labels).sum(-1)


def masked(images: Tensor, texts: Tensor, txt2img: Tensor) -> Tensor:
    """The same matrix with its labels in one comparison."""
    own = txt2img[None, :] == torch.arange(len(images), device=images.device)[:, None]
    return (images @ texts.T).masked_fill(~own, 0.0).sum(-1)
