"""Every line of `log.jsonl` in TensorBoard or Weights & Biases as well, through Accelerate.

A tracker is for looking on: where it is missing or fails, a warning says so once, and training goes on without it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, get_args

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from fastmat.errors import UserError, nearest
from fastmat.models.protocol import VisionLanguageModel

TrackerName = Literal["auto", "tensorboard", "wandb", "none"]
FOLDER = "trackers"  # in the run's folder


class Tracking:
    """A `Watcher`; close it when training ends. The first process writes, from the first line on.

    name: "auto" is TensorBoard where it is installed, else none. out: the run's folder; files go to `out/trackers/`.
    told: what the run was told, kept by the tracker. Raises UserError for an unknown name.
    """

    def __init__(self, name: TrackerName, *, out: Path, told: Mapping[str, Any], accelerator: Accelerator) -> None:
        if name not in get_args(TrackerName):
            raise UserError(f"there is no tracker {name!r}{nearest(str(name), get_args(TrackerName))}")
        self.name = name
        self.out = out
        self.told = told
        self.tracker: GeneralTracker | None = None
        self._begins = accelerator.is_main_process  # where this process has still to start it

    def logged(self, line: Mapping[str, Any]) -> None:
        if self._begins:
            self._begins = False
            self._attempt(self._start)
        values = {key: value for key, value in flat(line).items() if is_number(value) and key != "step"}
        if self.tracker is not None:
            tracker = self.tracker
            self._attempt(lambda: tracker.log(values, step=line["step"]))

    def saved(
        self, step: int, checkpoint: Path, attacked: AbstractContextManager[VisionLanguageModel]
    ) -> Mapping[str, Any] | None:
        return None

    def close(self) -> None:
        """What was logged is complete on the disk, or sent."""
        if self.tracker is not None:
            self._attempt(self.tracker.finish)
            self.tracker = None

    def _start(self) -> None:
        here = {str(kind) for kind in get_available_trackers()}
        default = "tensorboard" if "tensorboard" in here else "none"
        chosen = default if self.name == "auto" else self.name
        if chosen == "none":
            return
        if chosen not in here:
            warnings.warn(f"tracker: {chosen} is not installed (pip install {chosen}); log.jsonl has all that it would")
            return
        kind: Any = LOGGER_TYPE_TO_CLASS[chosen]
        folder = self.out / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        tracker = kind(chosen, folder) if kind.requires_logging_directory else kind("fastmat", dir=str(folder))
        tracker.start()
        tracker.store_init_configuration({key: as_plain(value) for key, value in flat(self.told).items()})
        self.tracker = tracker

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # a network, a full disk, another version: none of it is worth the run
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"the tracker failed and is off from here on ({said}); log.jsonl goes on")
            self.tracker = None


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings as one.

    >>> flat({"step": 1, "terms": {"fare": 0.5}})
    {'step': 1, 'terms/fare': 0.5}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        found |= flat(value, f"{name}/") if isinstance(value, Mapping) else {name: value}
    return found


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def as_plain(value: object) -> Any:
    """What trackers keep of a setting: numbers and text."""
    return value if isinstance(value, bool | int | float | str) else str(value)
