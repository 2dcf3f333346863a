"""One measured implementation of one case, as a line of rows.jsonl. Files of rows only grow."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastmat.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, kw_only=True)
class Row:
    """Rows of one case and run share `time`, since ratios are taken within a run.

    p20, p50, p80: milliseconds of a call. error: largest difference to the exact result over its largest entry, None
    for a limit. repeatable: two calls agreed bit by bit, where that was asked. peak: bytes above the inputs, results
    and gradients included, where that was asked. moved: bytes that the implementation must move.
    device: "cpu" or "cuda"; machine: its name. commit: of fastmat's checkout, "-dirty" with changes, else None.
    """

    time: str
    operator: str
    case: str
    shape: Mapping[str, int | float | str | bool]
    dtype: str
    implementation: str
    kind: str
    rounds: int
    p20: float
    p50: float
    p80: float
    error: float | None
    tolerance: float
    repeatable: bool | None
    peak: int | None
    moved: int | None
    device: str
    machine: str
    threads: int
    versions: Mapping[str, str]
    commit: str | None
    command: str


Kind = TypeVar("Kind", bound="DataclassInstance")


def append_rows(path: Path, rows: Sequence[DataclassInstance]) -> None:
    """All of them in one write, so that an interrupted run leaves whole cases."""
    lines = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)


def read_rows(path: Path) -> list[Row]:
    """Raises UserError naming file, line and field where a row is malformed. No file: no rows."""
    return read_rows_of(Row, path)


def read_rows_of(kind: type[Kind], path: Path) -> list[Kind]:
    """`read_rows` for rows of another dataclass."""
    if not path.exists():
        return []
    fields = typing.get_type_hints(kind)
    lines = path.read_bytes().splitlines()
    return [kind(**parse(line, fields, f"{path}, line {i}")) for i, line in enumerate(lines, 1)]


def parse(line: bytes, fields: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The fields of one line, each of its type."""
    try:
        found = json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        raise UserError(f"{place} is not JSON; remove the line, or restore the file") from None
    if not isinstance(found, dict) or found.keys() != fields.keys():
        wrong = sorted(found.keys() ^ fields.keys()) if isinstance(found, dict) else [type(found).__name__]
        raise UserError(f"{place} is no row of a benchmark: {wrong[0]}; remove the line, or restore the file")
    for name, annotation in fields.items():
        if not fits(found[name], annotation):
            raise UserError(f"{place}: {name} cannot be {found[name]!r}; remove the line, or restore the file")
    return found


def fits(value: object, annotation: object) -> bool:
    """Whether a value from JSON has an annotated type; an int is a float, a bool is no number."""
    if isinstance(annotation, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) is not None:
        options = typing.get_args(annotation)[1]
        return isinstance(value, dict) and all(fits(item, options) for item in value.values())
    if annotation in (int, float):
        allowed = (int,) if annotation is int else (int, float)
        return isinstance(value, allowed) and not isinstance(value, bool)
    return value is None if annotation is type(None) else isinstance(value, typing.cast(type, annotation))
