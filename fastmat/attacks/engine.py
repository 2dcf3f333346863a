"""How an attack is executed, never what it computes: arithmetic of the encoders, compilation, graphs, micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any, Literal, get_args

import torch
from torch import nn

from fastmat.attacks.folding import folded
from fastmat.errors import UserError
from fastmat.models.protocol import FusionState, ImageState, TextPrefixes, VisionLanguageModel

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Handed to an attack: `attack(model, batch, context, engine=Engine(precision="bf16"))`.

    precision: of both encoders. "bf16" is autocast inside them: the model normalises fp32 images first, and states,
        objectives, gradients of pixels and the images themselves stay fp32. An approximation; "fp32" is exact.
    compile: torch.compile of the image encoder, once per model; sums are taken in another order.
    cuda_graph: steps of a search are captured once per batch and replayed, which pays where the GPU waits for Python:
        small batches. The same arithmetic. CUDA only.
    fold: batch norms are folded into the convolutions before them: the same map, rounded elsewhere (`folding`). A
        compiler fuses them itself: nothing is folded under `compile`.
    micro_batch: most images at once, None: the batch. Halved where memory runs out. The context is that of the whole
        batch, so that nothing depends on it.
    Raises UserError for another precision or a micro_batch below 1.
    """

    precision: Precision = "fp32"
    compile: bool = False
    cuda_graph: bool = False
    fold: bool = True
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise UserError(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UserError(f"micro_batch must be at least 1, got {self.micro_batch}")


ENCODERS = ("encode_image", "encode_text", "text_prefixes", "continue_text", "fuse")

_active: ContextVar[Engine | None] = ContextVar("engine", default=None)


def active() -> Engine:
    """The engine of the attack that runs now."""
    return _active.get() or Engine()


@contextmanager
def executing(engine: Engine, model: VisionLanguageModel) -> Iterator[None]:
    """Inside, `model` encodes and searches step as `engine` says; as before outside.

    The model itself is changed, as `frozen` changes it: whatever holds it, asks what it is or keeps a cache for it goes
    on with the same object. An attack inside an attack inherits the engine, or brings its own.
    """
    assert isinstance(model, nn.Module)
    device = model.logit_scale.device
    if engine.cuda_graph and device.type != "cuda":
        raise UserError(f"cuda_graph needs a model on a CUDA device, this one is on {device}: leave cuda_graph off")
    names = [name for name in ENCODERS if hasattr(model, name)]
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    token = _active.set(engine)
    try:
        with folded(model) if engine.fold and not engine.compile else nullcontext():
            if engine.precision != "fp32" or engine.compile:
                vars(model).update({name: _executed(model, getattr(model, name), device.type) for name in names})
            yield
    finally:
        _active.reset(token)
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)


def _executed(model: VisionLanguageModel, encode: Callable[..., Any], device: str) -> Callable[..., Any]:
    """An encoder of `model`, executed as the engine that is active when it is called says."""

    def call(*arguments: Any) -> Any:
        with torch.autocast(device, torch.bfloat16) if active().precision == "bf16" else nullcontext():
            if active().compile and isinstance(encode, MethodType) and encode.__name__ == "encode_image":
                return in_fp32(compiled(encode.__func__)(model, *arguments))
            return in_fp32(encode(*arguments))

    return call


def in_fp32(state: Any) -> Any:
    """An image, text or fused state in fp32; keys and values of a prefix stay what the encoder made them."""
    if state is None:
        return None
    if isinstance(state, FusionState):
        return state._replace(tokens=state.tokens.float(), itm_logits=state.itm_logits.float())
    if isinstance(state, TextPrefixes):
        return state._replace(state=in_fp32(state.state))
    return state._replace(
        tokens=None if state.tokens is None else state.tokens.float(),
        embeds=state.embeds.float(),
        features=state.features.float(),
    )


@cache
def compiled(encode: Callable[..., ImageState]) -> Callable[..., ImageState]:
    """One program per model and kind of gradient; the second batch size seen makes it one for any."""
    return torch.compile(encode)
