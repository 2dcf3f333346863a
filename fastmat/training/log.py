"""`log.jsonl`: one line per logged step, and the clock of a run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class StepLog:
    """Appends lines to `path`; of an earlier run only the steps up to `start` stay. Not `enabled`: counts, no file.

    Seconds count from construction; `pairs_per_s` in a line is since the line before.
    """

    def __init__(self, path: Path, *, start: int, enabled: bool) -> None:
        self.path = path
        self.enabled = enabled
        self.pairs = 0
        self._began = self._last_time = time.perf_counter()
        self._last_pairs = 0
        if enabled and path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= start]
            path.write_text("".join(f"{line}\n" for line in kept))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def pairs_per_s(self) -> float:
        return self.pairs / max(self.seconds, 1e-9)

    def count(self, pairs: int) -> None:
        """Another step's image-caption pairs, of all processes together."""
        self.pairs += pairs

    def write(
        self,
        step: int,
        terms: Mapping[str, float],
        *,
        grad_norm: float,
        lr: float,
        skipped: int,
        taken: Mapping[str, float],
    ) -> dict[str, Any]:
        """The line of a finished step; what is not finite is written as null. taken: seconds since the line before."""
        now = time.perf_counter()
        rate = (self.pairs - self._last_pairs) / max(now - self._last_time, 1e-9)
        self._last_time, self._last_pairs = now, self.pairs
        line = {
            "step": step,
            "loss": _finite(sum(terms.values())),
            "terms": {name: _finite(value) for name, value in terms.items()},
            "grad_norm": _finite(grad_norm),
            "lr": lr,
            "skipped": skipped,
            "seconds": round(now - self._began, 3),
            "pairs_per_s": round(rate, 2),
            "taken": dict(taken),
        }
        self._append(line)
        return line

    def note(self, step: int, told: Mapping[str, Any]) -> dict[str, Any]:
        """A line of another kind after `step` steps."""
        line = {"step": step, **told}
        self._append(line)
        return line

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _step_of(line: str) -> float:
    """The step of a line; a line cut short by a crash counts as never written."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf
