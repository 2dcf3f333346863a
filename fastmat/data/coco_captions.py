"""Captions in COCO's own format (`captions_val2014.json`)."""

from __future__ import annotations

from pathlib import Path

from fastmat.data.annotations import field, pictures, read_json
from fastmat.data.captions import CaptionRule, preprocess
from fastmat.data.retrieval import RetrievalSet, read_retrieval_set
from fastmat.errors import UserError


def read_coco_captions(
    annotations: Path, images: Path, *, name: str, split: str, captions: CaptionRule = "none"
) -> RetrievalSet:
    """Read `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`, or a JSON list in the
    ALBEF/Karpathy format (`fastmat.data.retrieval`), which is told from it by being a list.

    images: the folder that file names start from. Images without captions are left out.
    Raises UserError naming the file and the entry.
    """
    content = read_json(annotations, what="captions in COCO's format")
    if isinstance(content, list):
        return read_retrieval_set(annotations, images, name=name, split=split, captions=captions)
    found: dict[object, list[str]] = {}
    for number, row in enumerate(field(content, "annotations", list, f"{annotations}"), start=1):
        where = f"{annotations}, annotation {number}"
        text = preprocess(field(row, "caption", str, where), captions)
        if not text:
            raise UserError(f"{where}: nothing of caption {row['caption']!r} is left by pre-processing '{captions}'")
        if "image_id" not in row:
            raise UserError(f"{where}: key 'image_id' is missing")
        found.setdefault(row["image_id"], []).append(text)
    ids, paths, places, texts = [], [], [], []
    for number, row in enumerate(field(content, "images", list, f"{annotations}"), start=1):
        where = f"{annotations}, image {number}"
        if not isinstance(row, dict) or "id" not in row:
            raise UserError(f"{where}: key 'id' is missing")
        if row["id"] in found:
            ids.append(str(row["id"]))
            paths.append(images / field(row, "file_name", str, where))
            places.append(where)
            texts.append(tuple(found.pop(row["id"])))
    if found:
        raise UserError(f"{annotations}: image {next(iter(found))} has a caption, but is not among its images")
    if not ids:
        raise UserError(f"{annotations}: no image in it has a caption")
    if len(set(ids)) < len(ids):
        raise UserError(f"{annotations}: two of its images have the same id")
    return RetrievalSet(
        name=name,
        split=split,
        captions=tuple(texts),
        ids=tuple(ids),
        group=tuple(range(len(ids))),
        load=pictures(paths, places),
    )
