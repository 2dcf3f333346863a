"""The rows of an evaluation as they come: each is on the disk before the next begins, so an interrupted run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, TypeVar

from fastmat.evaluation.results import Results, Row, Setting, read_json, to_json, write_atomic
from fastmat.tasks.results import TaskResults, TaskRow

Kind = TypeVar("Kind", Results, TaskResults)


class Rows(Generic[Kind]):
    """`folder/results.json`; with `resume`, a row that stands there is kept when its inputs are still the same.

    empty: the results of this run without a row. kept, made: how many rows were taken over and how many are new.
    """

    def __init__(self, folder: Path, *, empty: Kind, resume: bool) -> None:
        self.file = folder / "results.json"
        self.kept = self.made = 0
        self.results: Kind = empty
        # Behind those of this run until it is finished, so that an interruption loses none of them.
        self._earlier: list[Any] = []
        if resume and self.file.exists():
            self._earlier = list(read_json(self.file, type(empty)).rows)

    def find(self, setting: Setting, inputs: str) -> Any:
        """The finished row of a setting and its inputs, None without; it takes its place in the order of this run."""
        wanted = setting.model_dump()

        def fits(row: Row | TaskRow) -> bool:
            return row.inputs == inputs and row.model_dump(include=set(wanted)) == wanted

        for row in self.results.rows:
            if fits(row):
                return row
        for row in self._earlier:
            if fits(row):
                self._earlier.remove(row)
                self._append(row)
                self.kept += 1
                return row
        return None

    def add(self, row: Row | TaskRow) -> None:
        self._append(row)
        self.made += 1
        self._write(self._earlier)

    def finish(self) -> None:
        """Rows of earlier runs that this one did not ask for are dropped."""
        self._write([])

    def _append(self, row: Row | TaskRow) -> None:
        self.results = self.results.model_copy(update={"rows": [*self.results.rows, row]})

    def _write(self, more: list[Any]) -> None:
        write_atomic(self.file, to_json(self.results.model_copy(update={"rows": [*self.results.rows, *more]})))
