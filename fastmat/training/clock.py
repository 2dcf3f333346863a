"""Where the time of a step goes, measured without waiting for the device."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

PARTS = ("loading", "text_attack", "image_attack", "outer", "saving")


class StepClock:
    """`enter(part)` at every border, `read()` where the device has been waited for anyway.

    On a GPU borders are events in its stream, so a part counts what the device did and waited in it; elsewhere they are
    the time.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._borders: list[tuple[str, float | torch.cuda.Event]] = []
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def enter(self, part: str) -> None:
        """What follows belongs to `part`."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._borders.append((part, event))
        else:
            self._borders.append((part, time.perf_counter()))

    def read(self) -> None:
        """Add up what lies between the borders so far, all of which the device has passed."""
        for (part, begin), (_, end) in pairwise(self._borders):
            self._seconds[part] += _between(begin, end)
        del self._borders[:-1]

    def taken(self) -> dict[str, float]:
        """Seconds of every part, as read since the last call."""
        taken = {part: round(seconds, 4) for part, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return taken


def split_text(taken: dict[str, float]) -> str:
    """The three parts of the work of a step, as shares of all the time.

    >>> split_text({"loading": 1.0, "text_attack": 2.0, "image_attack": 5.0, "outer": 2.0, "saving": 0.0})
    'text 20%, image 50%, outer 20%'
    """
    whole = sum(taken.values()) or 1.0
    names = {"text_attack": "text", "image_attack": "image", "outer": "outer"}
    return ", ".join(f"{name} {100 * taken[part] / whole:.0f}%" for part, name in names.items())


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1000
    assert isinstance(begin, float) and isinstance(end, float)
    return end - begin
