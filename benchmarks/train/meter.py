"""What a training step does to its models, counted from outside by hooks, and which part takes the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastmat.benchmarks.attacks.meter import Meter

PARTS = ("text", "image", "outer", "loading")


class StepMeter(Meter):
    """Also counts the text rows that a gradient reaches: text_backwards."""

    def _text(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        super()._text(module, arguments)
        if arguments[0].requires_grad:
            arguments[0].register_hook(self._reached)

    def _reached(self, gradient: Tensor) -> None:
        self.counts["text_backwards"] += len(gradient)


class Split:
    """Seconds of a step by part; the innermost part counts. Costs nothing, and waits for nothing, while it is off."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] | None = None
        self._part, self._since = "", 0.0

    @contextmanager
    def watching(self) -> Iterator[dict[str, float]]:
        """On inside; what is yielded grows."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        try:
            yield self.seconds
        finally:
            self.seconds = None

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        before = self._turn(part)
        try:
            yield
        finally:
            self._turn(before)

    def timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The same call, all of it within `part`."""

        def wrapped(*arguments: Any, **named: Any) -> Any:
            with self(part):
                return call(*arguments, **named)

        return wrapped

    def _turn(self, part: str) -> str:
        """Charge the time since the last turn to the part that ends; gives back which."""
        if self.seconds is None:
            return ""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now, before = time.perf_counter(), self._part
        if before:
            self.seconds[before] += now - self._since
        self._part, self._since = part, now
        return before
