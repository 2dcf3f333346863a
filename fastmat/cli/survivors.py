"""The worst case of a task over its attacks: a row counts when it is right before and after each of one budget.

`right/INPUTS.safetensors` next to the results holds which rows an attack has left right, so that a resumed run needs
none of its adversarial sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fastmat.evaluation.evaluate import Measured
from fastmat.evaluation.results import write_atomic
from fastmat.tasks.results import TaskRow

WORST = "worst case"  # with a blank, which no label of an attack has


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """An attack at one radius through one surrogate; by victim its row, and what the row depends on."""

    surrogate: str
    rows: Mapping[str, TaskRow]
    inputs: Mapping[str, str]


class Survivors:
    """folder: where right rows are kept. used: whether there is anything to combine; nothing is written without."""

    def __init__(self, folder: Path, *, used: bool) -> None:
        self.folder = folder
        self.used = used
        self.outcomes: list[Outcome] = []

    def file(self, inputs: str) -> Path:
        return self.folder / f"{inputs}.safetensors"

    def ready(self, inputs: str) -> bool:
        """Whether the right rows of an outcome are there, if they are of use."""
        return not self.used or self.file(inputs).is_file()

    def write(self, inputs: str, right: Tensor | None) -> None:
        """Keep the right rows [N] bool of an outcome, if they are of use."""
        if self.used and right is not None:
            write_atomic(self.file(inputs), save({"right": right.contiguous()}))

    def right(self, inputs: Sequence[str]) -> Tensor:
        """[N] bool: right in all of several outcomes."""
        return torch.stack([load_file(self.file(of))["right"] for of in inputs]).all(0)

    def cases(self, surrogate: str) -> Iterator[list[Outcome]]:
        """The outcomes through a surrogate, budget by budget, where there are several."""
        here = [outcome for outcome in self.outcomes if outcome.surrogate == surrogate] if self.used else []
        threats = {next(iter(outcome.rows.values())).threat: None for outcome in here}
        for threat in threats:
            same = [outcome for outcome in here if next(iter(outcome.rows.values())).threat == threat]
            if threat.budgeted and len(same) > 1:
                yield same

    def finish(self, rows: Sequence[TaskRow]) -> None:
        """Remove what belongs to none of `rows`."""
        kept = {row.inputs for row in rows}
        for file in self.folder.glob("*.safetensors"):
            if file.stem not in kept:
                file.unlink()


def measured_of(rows: Sequence[TaskRow]) -> Measured:
    """Over several rows: the largest distance, the most words, all seconds."""
    return Measured(
        distance=max(row.max_distance for row in rows),
        words=max(row.max_words_changed for row in rows),
        seconds=sum(row.seconds or 0.0 for row in rows),
    )
