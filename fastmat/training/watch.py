"""What may look on while a run trains: robust validation, trackers. It decides nothing about the weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from fastmat.models.protocol import VisionLanguageModel


class Watcher(Protocol):
    """Every process calls every method, in the order of the watchers."""

    def logged(self, line: Mapping[str, Any]) -> None:
        """A line of `log.jsonl`, when it is written."""
        ...

    def saved(
        self, step: int, checkpoint: Path, attacked: AbstractContextManager[VisionLanguageModel]
    ) -> Mapping[str, Any] | None:
        """A checkpoint of `step` steps is complete, or gone on with. Inside `attacked` is the model with whole weights.

        What comes back is a line for `log.jsonl`, its number of steps added to it; `best: true` in it keeps this
        checkpoint, instead of the one before that was best.
        """
        ...
