"""ECCV Caption (Chun et al., ECCV 2022, arXiv 2204.03359): COCO's test split, judged by machines and people.

1,261 images with 22,550 right captions and 1,332 captions with 11,279 right images, among the 5,000 images and five
captions of each in Karpathy's test split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastmat.data.annotations import read_json
from fastmat.data.coco_ids import Judgements, join
from fastmat.data.retrieval import RetrievalSet
from fastmat.data.truth import Truth
from fastmat.errors import UserError


def read_eccv_caption(*, folder: Path, captions: Path, dataset: RetrievalSet, partial: bool = False) -> Truth:
    """The files of the package `eccv_caption` (github.com/naver-ai/eccv-caption, `eccv_caption/data`).

    folder: holds `eccv_image_to_caption.json` and `eccv_caption_to_image.json`, {"id": [ids]} in COCO's ids, and
        `original_image_to_caption.json`, which says what was judged.
    captions: COCO's `captions_val2014.json` or Karpathy's `dataset_coco.json`, by whose texts captions find their ids.
    partial: the set may be a part of the test split, as with `limit`; what refers to the rest is left out.
    Raises UserError as `fastmat.data.coco_ids.join`, and for a file that is missing or has another form.
    """
    folder = Path(folder)
    original = _read(folder / "original_image_to_caption.json")
    found = Judgements(
        where=f"{folder}",
        captions_of=_read(folder / "eccv_image_to_caption.json"),
        images_of=_read(folder / "eccv_caption_to_image.json"),
        images=frozenset(original),
        captions=frozenset(caption for own in original.values() for caption in own),
    )
    return join(found, dataset, captions=captions, partial=partial)


def _read(path: Path) -> dict[int, list[int]]:
    content = read_json(path, what="ids of right items, as the package eccv_caption has them")
    if not isinstance(content, dict) or not content:
        raise UserError(f'{path}: expected {{"id": [ids], ...}} with at least one query')
    return {_id(key, path): [_id(item, path) for item in _list(row, path)] for key, row in content.items()}


def _list(row: Any, path: Path) -> list[Any]:
    if not isinstance(row, list):
        raise UserError(f"{path}: expected a list of ids for every query, got {row!r}")
    return row


def _id(value: Any, path: Path) -> int:
    if isinstance(value, bool) or not str(value).isascii() or not str(value).isdigit():
        raise UserError(f"{path}: an id must be a whole number, got {value!r}")
    return int(value)
