"""Image-caption sets, and the reader of the field's own format (the ALBEF/Karpathy JSON list)."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from fastmat.data.captions import CaptionRule, preprocess
from fastmat.data.images import read_image
from fastmat.data.provenance import Provenance, read_provenance
from fastmat.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class RetrievalSet:
    """N images with their captions, in a fixed order.

    captions: per image, one or more. ids: unique per image.
    group: per image; an image and a caption match when the groups of the image and of the caption's image are equal.
    load: row to RGB picture; it can be pickled, so that worker processes can call it.
    provenance: per image and caption, what made it, None for a human; empty where humans made everything.
    """

    name: str
    split: str
    captions: tuple[tuple[str, ...], ...]
    ids: tuple[str, ...]
    group: tuple[int, ...]
    load: Callable[[int], Image.Image]
    provenance: tuple[tuple[Provenance | None, ...], ...] = ()

    def __post_init__(self) -> None:
        assert len(self.captions) == len(self.ids) == len(self.group)
        assert not self.provenance or [*map(len, self.provenance)] == [*map(len, self.captions)]

    @property
    def n_images(self) -> int:
        return len(self.ids)

    @property
    def n_captions(self) -> int:
        return sum(map(len, self.captions))

    def take(self, n: int) -> RetrievalSet:
        """The first `n` images. Raises UserError unless 1 <= n <= n_images."""
        if not 1 <= n <= self.n_images:
            raise UserError(f"{self.name}/{self.split} has {self.n_images} images, cannot take {n}")
        return replace(
            self,
            captions=self.captions[:n],
            ids=self.ids[:n],
            group=self.group[:n],
            provenance=self.provenance[:n],
        )

    def fingerprint(self) -> str:
        """SHA-256 of ids, captions and groups: equal fingerprints mean the same rows in the same order."""
        return hashlib.sha256(json.dumps([self.ids, self.captions, self.group]).encode()).hexdigest()


def read_retrieval_set(
    annotations: Path, images: Path, *, name: str, split: str, captions: CaptionRule = "none"
) -> RetrievalSet:
    """Read a JSON list of `{"image": path below `images`, "caption": string or list, "image_id"?: ..., "group"?: ...}`.

    Rows of one image merge, in the order of its first row (training files list one caption a row). Images of one
    `group` match one another's captions; without it an image is its own group. What augmented sets say about what was
    generated is kept (`fastmat.data.provenance`); further keys are ignored. That every image file is there is checked
    at once; pictures are decoded when they are loaded.

    Raises UserError naming the file and the row (the first is row 1).
    """
    found: dict[str, _Image] = {}
    owner: dict[str, str] = {}
    for number, row in enumerate(_read_list(annotations), start=1):
        where = f"{annotations}, row {number}"
        image = _string(row, "image", where)
        entry = found.setdefault(image, _Image(row=number, id=image, group=image))
        new = entry.row == number
        label = label_of(row, "image_id", where)
        if label is not None and not new and entry.id != label:
            raise UserError(f"{where}: image '{image}' has image_id {label} here, but {entry.id} in row {entry.row}")
        entry.id = entry.id if label is None else label
        if owner.setdefault(entry.id, image) != image:
            first = found[owner[entry.id]].row
            raise UserError(f"{where}: image_id {entry.id} already names '{owner[entry.id]}' in row {first}")
        group = label_of(row, "group", where)
        if group is not None and not new and entry.group != ("group", group):
            raise UserError(f"{where}: image '{image}' is in group {group} here, but not in row {entry.row}")
        entry.group = entry.group if group is None else ("group", group)
        entry.captions += captions_of(row, captions, where)
        made = len(entry.captions) - len(entry.provenance)
        entry.provenance += [read_provenance(row, where)] * made

    paths = tuple(images / image for image in found)
    missing = [(entry.row, path) for entry, path in zip(found.values(), paths, strict=True) if not path.is_file()]
    if missing:
        row_number, path = missing[0]
        raise UserError(
            f"{annotations}, row {row_number}: image file {path} is missing ({len(missing)} of {len(paths)} are); "
            f"check the image folder"
        )
    dense: dict[object, int] = {}
    return RetrievalSet(
        name=name,
        split=split,
        captions=tuple(tuple(entry.captions) for entry in found.values()),
        ids=tuple(entry.id for entry in found.values()),
        group=tuple(dense.setdefault(entry.group, len(dense)) for entry in found.values()),
        load=_Files(annotations, paths, tuple(entry.row for entry in found.values())),
        provenance=tuple(tuple(entry.provenance) for entry in found.values())
        if any(any(entry.provenance) for entry in found.values())
        else (),
    )


@dataclass
class _Image:
    """What the rows of one image have said so far; `row` is the first of them."""

    row: int
    id: str
    group: object
    captions: list[str] = field(default_factory=list)
    provenance: list[Provenance | None] = field(default_factory=list)


@dataclass(frozen=True)
class _Files:
    """Row to picture, from files."""

    annotations: Path
    paths: tuple[Path, ...]
    rows: tuple[int, ...]

    def __call__(self, index: int) -> Image.Image:
        return read_image(self.paths[index], where=f"{self.annotations}, row {self.rows[index]}: ")


def _read_list(path: Path) -> list[Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        rows = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation file") from None
    except OSError as error:
        raise UserError(f"{path}: the annotation file cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: byte {error.start} (line {line}) is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON at line {error.lineno}, column {error.colno} ({error.msg})") from None
    except ValueError:  # the only other one json raises
        raise UserError(f"{path}: a number in it has too many digits") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; expected a list of objects") from None
    if not isinstance(rows, list):
        kind = f"an object with the keys {', '.join(list(rows)[:5])}" if isinstance(rows, dict) else type(rows).__name__
        raise UserError(f'{path}: expected a list of {{"image": ..., "caption": ...}}, got {kind}')
    if not rows:
        raise UserError(f"{path}: the list is empty; expected at least one image with a caption")
    return rows


def _value(row: Any, key: str, where: str) -> Any:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with 'image' and 'caption', got {type(row).__name__}")
    if key not in row:
        others = [other for other in row if other not in ("image", "caption", "image_id", "group")]
        close = difflib.get_close_matches(key, others, n=1)
        hint = f"; rename '{close[0]}' to '{key}'" if close else f"; the row has: {', '.join(row) or 'nothing'}"
        raise UserError(f"{where}: key '{key}' is missing{hint}")
    return row[key]


def _string(row: Any, key: str, where: str) -> str:
    value = _value(row, key, where)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: '{key}' must be a string that is not empty, got {value!r}")
    return _encodable(value, key, where)


def _encodable(text: str, key: str, where: str) -> str:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where}: '{key}' {text!r} holds half a surrogate pair, which no text can; correct it")
    return text


def label_of(row: dict[str, Any], key: str, where: str) -> str | None:
    """`row[key]`, a string or a whole number, as a string; None where it is not there. Raises UserError otherwise."""
    value = row.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise UserError(f"{where}: '{key}' must be a string or a whole number, got {value!r}")
    return None if value is None else _encodable(str(value), key, where)


def captions_of(row: dict[str, Any], rule: CaptionRule, where: str) -> list[str]:
    """`row["caption"]`, one or several, pre-processed. Raises UserError, which begins with `where`, when unusable."""
    value = _value(row, "caption", where)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise UserError(f"{where}: 'caption' must be a string or a list of strings, got {value!r}")
    if not texts:
        raise UserError(f"{where}: the image has no caption; add one or remove the row")
    done = []
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{where}: every caption must be a string, got {text!r}")
        if not text.strip():
            raise UserError(f"{where}: empty caption; write one or remove it")
        done.append(preprocess(_encodable(text, "caption", where), rule))
        if not done[-1]:
            raise UserError(f"{where}: nothing of caption {text!r} is left by pre-processing '{rule}'")
    return done
