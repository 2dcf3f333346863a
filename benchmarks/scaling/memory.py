"""Bytes that stand on one GPU during a step."""

from __future__ import annotations

from dataclasses import dataclass

from fastmat.benchmarks.scaling.shapes import Model, Tower
from fastmat.benchmarks.scaling.strategies import Strategy
from fastmat.benchmarks.scaling.work import Texts, outer_text, passes_of, trained_parameters

FP32, BF16 = 4, 2


def saved_per_token(tower: Tower, *, trained: bool, width: int) -> int:
    """Bytes that one block keeps per token from forward to backward; width: bytes of an activation.

    Frozen weights: input of each norm (2 d), queries, keys, values and their result (4 d), input of the GELU (h). To
    train them, the input of each weight product as well: 2 d more for each half, h more for the last. Norms keep mean
    and deviation, attention one log-sum per head, in fp32.
    """
    d, h = tower.width, tower.hidden
    numbers = 8 * d + 2 * h if trained else 6 * d + h
    return numbers * width + 4 * FP32 + FP32 * tower.heads


def saved_bytes(tower: Tower, *, trained: bool, width: int, checkpointing: bool = False, shared: int = 1) -> float:
    """Of one row through all blocks. shared: rows that share the keys and values of their context.

    checkpointing: the input of every block, and all of one block while it is computed again.
    """
    block = float(tower.tokens * saved_per_token(tower, trained=trained, width=width))
    block += (5 * tower.tokens + 2 * tower.context / shared) * tower.width * width * bool(tower.context)
    if not checkpointing:
        return tower.layers * block
    return tower.layers * tower.tokens * tower.width * width + block


@dataclass(frozen=True, kw_only=True)
class Memory:
    """weights: fp32, with the shard's master copy, the bf16 copies of autocast and frozen models. inner, outer:
    activations of the attack and of the update, which never stand at once."""

    weights: float
    gradients: float
    optimiser: float
    inner: float
    outer: float
    queue: float

    @property
    def state(self) -> float:
        return self.weights + self.gradients + self.optimiser + self.queue

    @property
    def peak(self) -> float:
        return self.state + max(self.inner, self.outer)


def memory_of(
    model: Model,
    method: str,
    strategy: Strategy,
    texts: Texts,
    *,
    batch: int,
    gpus: int,
    checkpointing: bool = False,
    micro_batch: int | None = None,
) -> Memory:
    """micro_batch: pairs whose activations stand at once in the outer update; None: the batch."""
    passes = passes_of(method, model, texts)
    trained = trained_parameters(method, model)
    divided = [1 if strategy.stage < stage else gpus for stage in (1, 2, 3)]
    weights = model.parameters * FP32 / divided[2] + model.parameters * BF16
    if strategy.stage:
        weights += trained * FP32 / gpus  # DeepSpeed steps on a copy of its shard, also of fp32 weights
    if strategy.gathers == "step":
        weights += model.parameters * FP32
    elif strategy.gathers == "pass":  # no more than a block at a time
        weights += model.image.block_parameters * FP32
    weights += model.momentum_parameters * FP32 * ("momentum" in passes)
    weights += model.image.parameters * FP32 * ("teacher" in passes)

    width = BF16
    outer = saved_bytes(model.image, trained=True, width=width, checkpointing=checkpointing)
    if "text" in passes:
        outer += saved_bytes(outer_text(model, texts), trained=True, width=width, checkpointing=checkpointing)
    if "fusion" in passes and model.fusion is not None:
        rows = passes["fusion"].trained
        outer += rows * saved_bytes(model.fusion, trained=True, width=width, checkpointing=checkpointing, shared=rows)
    return Memory(
        weights=weights,
        gradients=trained * FP32 / divided[1] * (2 if strategy.stage == 0 and gpus > 1 else 1),  # DDP's buckets
        optimiser=2 * trained * FP32 / divided[0],
        inner=batch * saved_bytes(model.image, trained=False, width=width) * (passes["image"].attacked > 0),
        outer=min(batch, micro_batch or batch) * outer,
        queue=2 * model.queue * model.embed * FP32 * ("momentum" in passes),
    )
