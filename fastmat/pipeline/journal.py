"""Answers on the disk as they come, one a line, so that no question is asked twice."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from fastmat.errors import UserError
from fastmat.pipeline.results import Entry


class Journal:
    """An append-only file of `Entry`s, and what is in it. taken_over: how many were there before.

    Of a line that a kill cut short nothing is kept. Raises UserError, naming the line, when the file holds anything
    else.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._entries: dict[tuple[str, int], Entry] = {}
        if file.exists():
            self._read()
        self.taken_over = len(self._entries)

    def find(self, key: str, row: int) -> Entry | None:
        return self._entries.get((key, row))

    def missing(self, key: str, rows: Iterable[int]) -> list[int]:
        """Those of `rows` without an answer."""
        return [row for row in rows if (key, row) not in self._entries]

    def answers(self, key: str, rows: Iterable[int]) -> list[Entry]:
        """The entries of `rows`, which must be there, in order."""
        return [self._entries[key, row] for row in rows]

    def add(self, entries: Iterable[Entry]) -> None:
        """On the disk when this returns."""
        new = list(entries)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as file:
            file.write("".join(f"{entry.model_dump_json()}\n" for entry in new).encode())
            file.flush()
            os.fsync(file.fileno())
        self._entries |= {(entry.key, entry.row): entry for entry in new}

    def _read(self) -> None:
        content = self.file.read_bytes()
        whole = content.rpartition(b"\n")[0]
        lines = whole.split(b"\n") if whole else []
        for number, line in enumerate(lines, start=1):
            try:
                entry = Entry.model_validate_json(line)
            except ValidationError:
                raise UserError(
                    f"{self.file}, line {number}: no answer as fastmat writes it; remove the line, or name a new --out"
                ) from None
            self._entries[entry.key, entry.row] = entry
        kept = len(whole) + 1 if lines else 0
        if len(content) > kept:
            os.truncate(self.file, kept)
