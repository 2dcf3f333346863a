"""What a training step of the benchmark is, and who takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from fastmat.attacks.draws import Draws
from fastmat.benchmarks.attacks.words import Trace
from fastmat.models.dual_encoder import DualEncoder
from fastmat.types import Batch

Dtype = Literal["float32", "bfloat16", "float16"]


class Stepped(NamedTuple):
    """What a step did: images [B, 3, H, W] and texts that the outer forward read, its loss, and the gradient's parts.

    trace: of the published text loop alone.
    """

    images: Tensor
    texts: tuple[str, ...]
    loss: Tensor
    trace: Trace | None = None


Step = Callable[[Batch, Draws], Stepped]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One who takes the step, from the attack to the update.

    kind: "fastmat", "published" or "tuned"; "finetune" and "plain finetune" take the step without an attack.
    model, optimizer: where the gate reads gradients before the update. The learning rate is 0: an update is the same
        work, and all start every step from the same weights. watched: other models that it runs.
    like: the kind, in fp32, whose step it must repeat. gated: what the gate runs, where `step` departs on purpose.
    """

    kind: str
    dtype: Dtype
    step: Step
    model: DualEncoder
    optimizer: Optimizer
    watched: tuple[DualEncoder, ...] = ()
    like: str = "published"
    gated: Step | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """batch: of a step's number, one caption per image. The contestants that others must repeat stand first.

    values: [B] losses of the images and texts that a step made from batch 0, in fp32, without a graph.
    loss: the outer loss of the same in fp32, as the plain loop writes it, with a graph to the weights of `model`.
    """

    name: str
    batch: Callable[[int], Batch]
    model: DualEncoder
    values: Callable[[Stepped], Tensor]
    loss: Callable[[Stepped], Tensor]
    contestants: tuple[Contestant, ...]
