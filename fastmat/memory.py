"""Work on N items in chunks that fit in memory: out-of-memory halves the chunk and goes on."""

from __future__ import annotations

import gc
import logging
from bisect import bisect_right
from collections.abc import Callable
from typing import TypeVar

import torch

from fastmat.errors import UserError

T = TypeVar("T")
# What allocators raise that have no exception of their own: PyTorch's on the CPU, and CUDA's libraries.
SIGNS = ("DefaultCPUAllocator: ", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

log = logging.getLogger(__name__)


class Chunks:
    """How much of one kind of work fits at once; what an out-of-memory taught is remembered for the next call.

    size: most that a chunk may cost, None: everything at once until memory runs out.
    item, advice: of the messages: what one item is, and what to do when a single one does not fit.
    """

    def __init__(self, size: int | None = None, *, item: str, advice: str) -> None:
        assert size is None or size >= 1
        self.size = size
        self.item = item
        self.advice = advice

    def run(
        self,
        n: int,
        work: Callable[[int, int], T],
        *,
        at_most: int | None = None,
        cost: Callable[[int, int], int] = lambda start, stop: stop - start,
    ) -> list[T]:
        """`work(start, stop)` over [0, n), in order, each chunk as long as its cost allows; the results.

        at_most: a limit of this call beside `size`. cost: of the items start:stop, in any unit (their number, their
        tokens with or without padding); it must not fall as stop grows. One item is always tried, whatever it costs.
        A chunk that ran out of memory is repeated from its start in halves, so `work` should only change what it
        returns. Raises UserError when a single item does not fit.
        """
        done: list[T] = []
        start = 0
        while start < n:
            stop = start + max(1, self._count(n, start, cost, at_most))
            try:
                done.append(work(start, stop))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if stop - start == 1:
                    raise UserError(f"memory does not hold the work on one {self.item}: {self.advice}") from error
            else:
                start = stop
                continue
            # Only here: while the error is handled, its traceback keeps every tensor of the failed chunk alive.
            free_caches()
            self.size = max(cost(start, stop) // 2, 1)
            log.warning("out of memory at %d x %s at once: at most %d from now on", stop - start, self.item, self.size)
        return done

    def _count(self, n: int, start: int, cost: Callable[[int, int], int], at_most: int | None) -> int:
        limits = [limit for limit in (self.size, at_most) if limit is not None]
        if not limits:
            return n - start
        return bisect_right(range(start + 1, n + 1), min(limits), key=lambda stop: cost(start, stop))


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator had no room, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def free_caches() -> None:
    """Give back what is held for reuse."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
