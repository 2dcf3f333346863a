"""The symmetric contrastive loss and its gradients, against open_clip's ClipLoss and the packages that fuse it.

fastmat bench ops --only contrastive
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

from fastmat.benchmarks.harness import Case, Implementation, Tensors, Work, can_compile
from fastmat.ops import contrastive_loss

WIDTH = 512
SCALE = 1 / 0.07  # CLIP's first one; at 100 a logit in bf16 is known to 0.4 only, and opponents would fail the gate
# fp32 products on a GPU are TF32 here, for everybody.
TOLERANCE = {("cpu", "float32"): 1e-4, ("cuda", "float32"): 5e-3, ("cuda", "bfloat16"): 5e-2}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device: torch.device, short: bool) -> list[Case]:
    cuda = device.type == "cuda"
    sizes = (33,) if short else (1024, 4096, 16384, 32768, 65536) if cuda else (1024, 4096, 8192)
    return [
        Case(
            operator="contrastive_loss",
            name=f"N={n}" + ("" if dtype == torch.float32 else " bf16"),
            shape={"rows": n, "columns": n, "width": WIDTH},
            dtype=str(dtype).removeprefix("torch."),
            tolerance=TOLERANCE[device.type, str(dtype).removeprefix("torch.")],
            build=partial(build, n, dtype, device, short),
            memory=not short,
        )
        for dtype in ((torch.float32, torch.bfloat16) if cuda else (torch.float32,))
        for n in sizes
    ]


def test_contrastive(benchmark: Callable[[Callable[[], Tensors]], Tensors], micro: Callable[[], Tensors]) -> None:
    """With pytest-benchmark; see conftest.py."""
    benchmark(micro)


def build(n: int, dtype: torch.dtype, device: torch.device, short: bool) -> Work:
    generator = torch.Generator(device).manual_seed(0)
    images = F.normalize(torch.randn(n, WIDTH, generator=generator, device=device), dim=1)
    texts = F.normalize(images + 0.05 * torch.randn(n, WIDTH, generator=generator, device=device), dim=1)
    images, texts = (features.to(dtype).requires_grad_() for features in (images, texts))
    scale = torch.tensor(SCALE, device=device, requires_grad=True)

    def with_gradients(loss: Loss) -> Callable[[], Tensors]:
        """The loss, and the gradients of both features; the scale's is computed too where the loss has one."""

        def call() -> Tensors:
            value = loss(images, texts, scale)
            found = torch.autograd.grad(value, (images, texts, scale), allow_unused=True)
            return value.detach(), found[0], found[1]

        return call

    clip = ClipLoss()
    found = [
        Implementation(name="fastmat", kind="fastmat", call=with_gradients(contrastive_loss)),
        Implementation(name="open_clip ClipLoss", kind="published", call=with_gradients(clip)),
        Implementation(name="one product", kind="tuned", call=with_gradients(one_product)),
    ]
    if not short and can_compile(device):
        fast = torch.compile(one_product, dynamic=False, fullgraph=True)
        found.append(Implementation(name="one product, compiled", kind="tuned", call=with_gradients(fast)))
    if device.type == "cuda":
        packages: dict[str, Loss] = {"memeff": memeff, "inf_cl": inf_cl}
        found += [
            Implementation(name=name, kind="fused", call=with_gradients(loss))
            for name, loss in packages.items()
            if find_spec(name)
        ]
    return Work(lambda: exact(images.detach(), texts.detach(), SCALE), found)


def one_product(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """ClipLoss with one matrix product instead of two, its transpose for the other direction."""
    logits = scale.to(images.dtype) * images @ texts.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def memeff(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """b0nce/MemoryEfficientCLIP; its temperature is a constant."""
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)(images, texts)


def inf_cl(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """DAMO-NLP-SG/Inf-CLIP, one call per direction; it takes `scale` only in a distributed run."""
    from inf_cl import cal_inf_loss

    return (cal_inf_loss(scale * images, texts) + cal_inf_loss(scale * texts, images)) / 2


def exact(images: Tensor, texts: Tensor, scale: float, rows: int = 1024) -> Tensors:
    """Loss and gradients in fp64, a block of rows at a time."""
    n = len(images)
    wide_images, wide_texts = images.double(), texts.double()
    own = scale * (wide_images * wide_texts).sum(1)
    by_row = own.new_empty(n)
    by_column = torch.full_like(own, -torch.inf)
    for start in range(0, n, rows):
        logits = scale * wide_images[start : start + rows] @ wide_texts.T
        by_row[start : start + rows] = logits.logsumexp(1)
        by_column = torch.logaddexp(by_column, logits.logsumexp(0))
    of_images, of_texts = -2 * wide_texts, -2 * wide_images
    for start in range(0, n, rows):
        block = slice(start, start + rows)
        logits = scale * wide_images[block] @ wide_texts.T
        weight = (logits - by_row[block, None]).exp() + (logits - by_column).exp()
        of_images[block] += weight @ wide_texts
        of_texts += weight.T @ wide_images[block]
    loss = ((by_row - own).mean() + (by_column - own).mean()) / 2
    return loss, of_images * (scale / (2 * n)), of_texts * (scale / (2 * n))
