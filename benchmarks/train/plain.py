"""What the plain loops share: losses, start and update as one writes them down; one caption per image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from fastmat.attacks.base import frozen
from fastmat.attacks.draws import Draws
from fastmat.benchmarks.train.job import Dtype
from fastmat.models.dual_encoder import DualEncoder
from fastmat.types import Batch


def clip_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit features [B, E] and [B, E]; scalar."""
    logits = scale * images @ texts.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def attacked_clip_loss(images: Tensor, texts: Tensor, clean: Tensor, scale: Tensor) -> Tensor:
    """[B]: the same for each image alone, all others being clean: `images` are attacked, `clean` are not."""
    labels = torch.arange(len(images), device=images.device)
    live = scale * (images * texts).sum(-1)
    own = torch.eye(len(images), dtype=torch.bool, device=images.device)
    to_images = torch.where(own, live[:, None], scale * texts @ clean.T)
    to_texts = scale * images @ texts.T
    rows = F.cross_entropy(to_texts, labels, reduction="none") + F.cross_entropy(to_images, labels, reduction="none")
    return rows / 2


def noisy(batch: Batch, eps: float, draws: Draws, *, clamp: bool = True) -> Tensor:
    """A uniform start in the ball."""
    x = batch.images + eps * draws.uniform("start", batch.index, batch.images.shape[1:])
    return x.clamp(0.0, 1.0) if clamp else x


def moved(x: Tensor, gradient: Tensor, x0: Tensor, *, eps: float, step_size: float) -> Tensor:
    """A sign step, back into ball and box."""
    x = x.detach() + step_size * gradient.sign()
    return torch.min(torch.max(x, x0 - eps), x0 + eps).clamp(0.0, 1.0)


def updated(optimizer: Optimizer, loss: Callable[[], Tensor]) -> Tensor:
    """The outer step on a scalar loss, which is read, as for a log line."""
    optimizer.zero_grad()
    value = loss()
    value.backward()
    optimizer.step()
    value.item()
    return value.detach()


@contextmanager
def attack_mode(model: DualEncoder, dtype: Dtype) -> Iterator[None]:
    """What a tuned attack sets: no gradients of weights, and its precision."""
    with frozen(model), lowered(model, dtype):
        yield


def lowered(model: DualEncoder, dtype: Dtype) -> torch.autocast:
    """Autocast in `dtype`; none in fp32."""
    kind = torch.float16 if dtype == "float16" else torch.bfloat16
    return torch.autocast(model.logit_scale.device.type, kind, enabled=dtype != "float32")
