"""Captions that somebody else has made, from a JSONL file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from fastmat.augment.files import named_file
from fastmat.augment.offline import Request
from fastmat.errors import UserError


class JsonLines:
    """Captions out of a file.

    path: one {"image_id": ..., "caption": ...} a line; image_id is that of the set, which without one is the path of
        the image as the set has it. Lines of images that the set does not have are left alone.
    title: who or what made them, as provenance and tables shall say.
    """

    per: Literal["caption", "image"] = "image"

    def __init__(self, *, path: Path, title: str = "jsonl") -> None:
        self.captions = read_lines(path)
        self.copies: int | None = max(map(len, self.captions.values()))
        self.name = title
        self.model = named_file(path)

    def __call__(self, requests: Sequence[Request]) -> list[str | None]:
        own = [self.captions.get(request.image_id, ()) for request in requests]
        return [
            texts[request.copy] if request.copy < len(texts) else None
            for request, texts in zip(requests, own, strict=True)
        ]


def read_lines(path: Path) -> Mapping[str, Sequence[str]]:
    """Captions by image id, in the order of the file. Raises UserError naming file and line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a JSONL file of captions") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    found: dict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        image_id, caption = (row.get(key) for key in ("image_id", "caption")) if isinstance(row, dict) else (None, None)
        if isinstance(image_id, bool) or not isinstance(image_id, str | int) or not isinstance(caption, str):
            raise UserError(f'{path}, line {number}: expected {{"image_id": ..., "caption": "..."}}, got {line[:80]}')
        found[str(image_id)].append(caption)
    if not found:
        raise UserError(f'{path} is empty; expected lines of {{"image_id": ..., "caption": "..."}}')
    return found
