"""What the readers of public annotation files share: parsed files, checked fields, pictures by their paths."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from fastmat.data.images import read_image
from fastmat.errors import UserError

KINDS = {str: "a string that is not empty", int: "a whole number", float: "a number", list: "a list"}


def read_json(path: Path, *, what: str) -> Any:
    """The value in a JSON file. what: it holds, for messages. Raises UserError naming the file."""
    return _parsed(_read(path, what).decode("utf-8-sig", "replace"), f"{path}")


def read_json_lines(path: Path, *, what: str) -> list[tuple[str, Any]]:
    """(place for messages, value) of every line of a JSON Lines file that is not blank."""
    lines = _read(path, what).decode("utf-8-sig", "replace").splitlines()
    places = ((f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    return [(place, _parsed(line, place)) for place, line in places]


class _Plain(pickle.Unpickler):
    """Lists, dictionaries, texts and numbers; whatever would run code is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_plain_pickle(path: Path, *, what: str) -> Any:
    """The plain values in a pickle, as RefCOCO's `refs(unc).p` is one; code in it is never run.

    Raises UserError naming the file, also for one that holds more than lists, dictionaries, texts and numbers.
    """
    _read(path, what)
    try:
        with open(path, "rb") as file:
            return _Plain(file, encoding="latin1").load()  # written by Python 2
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(
            f"{path}: cannot be read as plain values ({error}); it is damaged or carries code, which is never run"
        ) from None


def field(row: Any, key: str, kind: type, where: str) -> Any:
    """`row[key]`, checked to be of `kind` (float: any number). Raises UserError, which begins with `where`."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with '{key}', got {type(row).__name__}")
    if key not in row:
        raise UserError(f"{where}: key '{key}' is missing; it has: {', '.join(map(str, row)) or 'nothing'}")
    value = row[key]
    fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not fits or (kind is str and not value.strip()):
        raise UserError(f"{where}: '{key}' must be {KINDS[kind]}, got {value!r}")
    return value


@dataclass(frozen=True)
class Pictures:
    """Row to picture, from files; places: where in the annotations each row stands. It can be pickled."""

    paths: tuple[Path, ...]
    places: tuple[str, ...]

    def __call__(self, index: int) -> Image.Image:
        return read_image(self.paths[index], where=f"{self.places[index]}: ")


def pictures(paths: Sequence[Path], places: Sequence[str]) -> Pictures:
    """Raises UserError for the first file that is missing, saying how many are."""
    distinct = {path: path.is_file() for path in dict.fromkeys(paths)}
    missing = [place for path, place in zip(paths, places, strict=True) if not distinct[path]]
    if missing:
        absent = [path for path, there in distinct.items() if not there]
        raise UserError(
            f"{missing[0]}: image file {absent[0]} is missing ({len(absent)} of {len(distinct)} are); "
            "check the image folder"
        )
    return Pictures(tuple(paths), tuple(places))


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected {what}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON at line {error.lineno}, column {error.colno} ({error.msg})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not JSON that can be read") from None
