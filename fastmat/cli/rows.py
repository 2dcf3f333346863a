"""The rows of an evaluation as they come: each is on the disk before the next begins, so an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmat.errors import UserError
from fastmat.evaluation.results import Results, Row, Setting, read_results, write_results


class Rows:
    """`folder/results.json`; with `resume`, the rows that stand there are kept and not evaluated again.

    Raises UserError when the rows there were made with another config.
    """

    def __init__(
        self, folder: Path, *, config: Mapping[str, Any], environment: Mapping[str, Any], resume: bool
    ) -> None:
        self.folder = folder
        rows: list[Row] = []
        if resume and (folder / "results.json").exists():
            found = read_results(folder)
            different = [key for key in config if found.config.get(key) != config[key]]
            if different:
                raise UserError(
                    f"{folder} was begun with another '{different[0]}'; repeat that config, or name a new folder"
                )
            rows = found.rows
        self.results = Results(rows=rows, config=dict(config), environment=dict(environment))

    def find(self, setting: Setting) -> Row | None:
        """The finished row of a setting."""
        wanted = setting.model_dump()
        return next((row for row in self.results.rows if row.model_dump(include=set(wanted)) == wanted), None)

    def add(self, row: Row) -> None:
        self.results = self.results.model_copy(update={"rows": [*self.results.rows, row]})
        write_results(self.folder, self.results)
