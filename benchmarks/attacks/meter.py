"""What an attack does to its models, counted from outside by hooks, and where its time goes."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForMaskedLM

from fastmat.models.dual_encoder import DualEncoder

Result = TypeVar("Result")
PARTS = ("mlm", "text", "image", "other")
TEXT_METHODS = ("encode_text", "text_prefixes", "continue_text")


@dataclass(kw_only=True)
class Meter:
    """Of one call: text rows and token positions encoded, image rows forward and backward, text-encoder and language
    model calls, forwards whose weights wanted gradients; seconds by part.

    A text counts where it enters the text projection, an image where it leaves the image tower; the backward is
    counted where the gradient arrives there. Everything autograd does counts as "image", since no attack here
    differentiates a text.
    """

    counts: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @contextmanager
    def watching(self, models: Sequence[DualEncoder], berts: Sequence[BertForMaskedLM]) -> Iterator[None]:
        """Counts inside, whichever of the models is used."""
        clock = Clock(self.seconds, models[0].logit_scale.device)
        handles: list[Any] = []
        for model in models:
            handles.append(model.text_projection.register_forward_pre_hook(self._text))
            handles.append(model.image_tower.register_forward_hook(self._image))
            for root, part in (
                (model.text_tower, "text"),
                (model.text_projection, "text"),
                (model.image_tower, "image"),
                (model.image_projection, "image"),
            ):
                handles += clock.watch(root, part)
            for name in TEXT_METHODS:  # what they do between modules counts, too
                vars(model)[name] = clock.timed(getattr(model, name), "text")
        for bert in berts:
            handles += [*clock.watch(bert, "mlm"), bert.bert.register_forward_hook(self._mlm)]
        backward = torch.autograd.backward, torch.autograd.grad
        torch.autograd.backward, torch.autograd.grad = (clock.timed(call, "image") for call in backward)
        begun = clock.now()
        try:
            yield
        finally:
            torch.autograd.backward, torch.autograd.grad = backward
            for handle in handles:
                handle.remove()
            for model in models:
                for name in TEXT_METHODS:
                    del vars(model)[name]
            self.seconds["other"] = clock.now() - begun - sum(self.seconds[part] for part in PARTS[:-1])

    def shares(self) -> dict[str, float]:
        total = sum(self.seconds.values())
        return {part: spent / total for part, spent in self.seconds.items()}

    def _text(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.counts["text_encodings"] += len(arguments[0])
        self.counts["text_calls"] += 1

    def _image(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        pooled = output[0]
        self.counts["image_forwards"] += len(pooled)
        if pooled.requires_grad:
            pooled.register_hook(self._arrived)
            self.counts["with_weight_gradients"] += len(pooled) * any(p.requires_grad for p in module.parameters())

    def _arrived(self, gradient: Tensor) -> None:
        self.counts["image_backwards"] += len(gradient)

    def _mlm(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.counts["mlm_sequences"] += len(output[0])
        self.counts["mlm_calls"] += 1


class Clock:
    """Seconds inside modules. A part runs while any module below its root does, whichever of them is called."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self.seconds = seconds
        self.device = device
        self.depth: Counter[str] = Counter()
        self.begun: dict[str, float] = {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def enter(self, part: str) -> None:
        if not sum(self.depth.values()):
            self.begun[part] = self.now()
        self.depth[part] += 1

    def leave(self, part: str) -> None:
        self.depth[part] -= 1
        if not sum(self.depth.values()):
            self.seconds[part] += self.now() - self.begun[part]

    def watch(self, root: nn.Module, part: str) -> list[Any]:
        found: list[Any] = []
        for module in root.modules():
            found.append(module.register_forward_pre_hook(lambda *_: self.enter(part)))
            found.append(module.register_forward_hook(lambda *_: self.leave(part), always_call=True))
        return found

    def timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            self.enter(part)
            try:
                return call(*arguments, **named)
            finally:
                self.leave(part)

        return wrapped


class HostReads(TorchFunctionMode):
    """On the CPU: tensors turned into Python or NumPy values, each of which would wait for a GPU.

    `.item()`, `int()`, `bool()`, `float()` and indexing by a tensor arrive as `aten._local_scalar_dense`; `nonzero`
    and its kin need a size on the host; `tolist`, `numpy` and `cpu` do not pass the dispatcher and are caught above it.
    Reads of tensors that would live on the host anyhow (token ids before they are moved) are counted with the rest.
    """

    NAMES = ("tolist", "numpy", "cpu")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.NAMES
        return func(*args, **(kwargs or {}))


class ScalarReads(TorchDispatchMode):
    """The dispatcher's side of `HostReads`."""

    OPS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self.count += func.overloadpacket in self.OPS
        return func(*args, **(kwargs or {}))


def with_host_syncs(call: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """The result and how often `call` waits for the device: on a GPU what CUDA's debug mode warns of, on the CPU
    `HostReads`. Slow: every operation passes through Python."""
    if device.type != "cuda":
        with HostReads() as above, ScalarReads() as below:
            result = call()
        return result, above.count + below.count
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return result, sum("synchroniz" in str(warning.message) for warning in caught)
