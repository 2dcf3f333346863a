"""Several processes with one result: `accelerate launch` or `torchrun` start them, the first one speaks and writes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastmat.cli.common import Interrupted
from fastmat.errors import UserError
from fastmat.training.interrupt import interruptible

T = TypeVar("T")
WAIT = timedelta(days=7)  # while the first process judges, the others have nothing to do


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run; alone, every method gives back what it is given.

    Whoever waits for a process that has ended is interrupted, too.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agreed(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all of them; a UserError as well."""
        made: list[Any] = [None]
        if self.first:
            try:
                made = [make()]
            except UserError as error:
                made = [error]
        if self.count > 1:
            with waiting():
                dist.broadcast_object_list(made, src=0)
        if isinstance(made[0], UserError):
            raise made[0]
        value: T = made[0]
        return value

    def all(self, value: T) -> list[T]:
        """The value of every process, by rank, for all of them."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            with waiting():
                dist.all_gather_object(values, value)
        return values

    def to_first(self, value: T) -> list[T]:
        """The value of every process, by rank, for the first; the others get an empty list."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with waiting():
            dist.gather_object(value, values if self.first else None, dst=0)
        return values if self.first else []

    def device(self, device: torch.device) -> torch.device:
        """Each process its own GPU, where no index was asked for."""
        if self.count == 1 or device.type != "cuda" or device.index is not None:
            return device
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def together() -> Iterator[Processes]:
    """The processes that a launcher started, connected; what they exchange lies on the CPU, hence gloo."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    dist.init_process_group("gloo", timeout=WAIT)
    try:
        yield Processes(rank=dist.get_rank(), count=count)
    finally:
        dist.destroy_process_group()


@contextmanager
def waiting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo: the connection is gone
        raise Interrupted("another process ended; the same command with --resume goes on") from error


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C or SIGTERM (what schedulers and launchers send) only makes the function return True."""
    with interruptible() as interrupted:
        if threading.current_thread() is not threading.main_thread():
            yield interrupted
            return
        terminated = threading.Event()
        previous = signal.getsignal(signal.SIGTERM)

        def note(number: int, frame: FrameType | None) -> None:
            terminated.set()
            signal.signal(signal.SIGTERM, previous)

        signal.signal(signal.SIGTERM, note)
        try:
            yield lambda: interrupted() or terminated.is_set()
        finally:
            signal.signal(signal.SIGTERM, previous)
