"""The rows of an evaluation as they come: each is on the disk before the next begins, so an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmat.evaluation.results import Results, Row, Setting, read_results, write_results


class Rows:
    """`folder/results.json`; with `resume`, a row that stands there is kept when its inputs are still the same.

    kept, made: how many rows were taken over and how many are new.
    """

    def __init__(
        self, folder: Path, *, config: Mapping[str, Any], environment: Mapping[str, Any], resume: bool
    ) -> None:
        self.folder = folder
        self.kept = self.made = 0
        self.results = Results(rows=[], config=dict(config), environment=dict(environment))
        # Behind those of this run until it is finished, so that an interruption loses none of them.
        self._earlier: list[Row] = []
        if resume and (folder / "results.json").exists():
            self._earlier = read_results(folder).rows

    def find(self, setting: Setting, inputs: str) -> Row | None:
        """The finished row of a setting and its inputs; it takes its place in the order of this run."""
        wanted = setting.model_dump()

        def fits(row: Row) -> bool:
            return row.inputs == inputs and row.model_dump(include=set(wanted)) == wanted

        found = next(filter(fits, self.results.rows), None)
        if found is None and (found := next(filter(fits, self._earlier), None)) is not None:
            self._earlier.remove(found)
            self._append(found)
            self.kept += 1
        return found

    def add(self, row: Row) -> None:
        self._append(row)
        self.made += 1
        self._write(self._earlier)

    def finish(self) -> None:
        """Rows of earlier runs that this one did not ask for are dropped."""
        self._write([])

    def _append(self, row: Row) -> None:
        self.results = self.results.model_copy(update={"rows": [*self.results.rows, row]})

    def _write(self, more: list[Row]) -> None:
        write_results(self.folder, self.results.model_copy(update={"rows": [*self.results.rows, *more]}))
