"""Work that is repeated on the same tensors, as a CUDA graph: one launch instead of one per kernel.

Captured by hand. `torch.compile(mode="reduce-overhead")` makes graphs too, but its outputs live in buffers that the
next call overwrites, gradients among them, which a loop that keeps a gradient does not survive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Repeated(Generic[T]):
    """`work()` run once as it is, captured at the second call, replayed from then on.

    Each call does the work once, the first on a side stream: it makes what cannot be made during a capture (handles,
    workspaces, compiled kernels). `work` may only read and write tensors that stay where they are, must not wait for
    the device, and takes what changes between calls out of buffers that its caller fills. From the second call on the
    result is the same tensors with new contents: clone what is to outlive the next call.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self.work = work
        self.warm = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: T

    def __call__(self) -> T:
        if not self.warm:
            self.warm = True
            return self._on_a_side_stream()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.work()  # recorded, not run
        self.graph.replay()
        return self.result

    def _on_a_side_stream(self) -> T:
        side, here = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            result = self.work()
        here.wait_stream(side)
        return result
