"""Ctrl-C and SIGTERM during training: finish the batch, save, say how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Interrupted(Exception):
    """Training was asked to stop and did; `checkpoint` is where it can be resumed from.

    asked_by: the signal: SIGINT (Ctrl-C), or SIGTERM, which schedulers send before they kill.
    """

    def __init__(self, checkpoint: Path, asked_by: signal.Signals = signal.SIGINT) -> None:
        super().__init__(f"interrupted; the state is saved in {checkpoint}")
        self.checkpoint = checkpoint
        self.asked_by = asked_by


@contextmanager
def interruptible(number: signal.Signals = signal.SIGINT) -> Iterator[Callable[[], bool]]:
    """Inside, the first such signal only makes the yielded function return True.

    A second Ctrl-C acts as usual. A second SIGTERM changes nothing, since a scheduler and a launcher may both send it.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # signals reach the main thread only
        return
    previous = signal.getsignal(number)

    def note(signum: int, frame: FrameType | None) -> None:
        asked.set()
        if number == signal.SIGINT:
            signal.signal(number, previous)

    signal.signal(number, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(number, previous)
