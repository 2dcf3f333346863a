"""Referring expressions in the files that ALBEF's grounding protocol reads (RefCOCO+ of Licheng Yu's `refer`).

    refcoco+_val.json, refcoco+_test.json   [{"image": path, "text": expression, "ref_id": N}, ...], ALBEF's
    refcoco+/refs(unc).p                    [{"ref_id", "ann_id", "image_id", "split": "val" | "testA" | ...}, ...], a
                                            pickle of plain values (or the same list as JSON)
    refcoco+/instances.json                 {"images": [{"id", "height", "width"}], "annotations": [{"id", "bbox"}]}
    refcoco+/dets.json                      {image id: [[x, y, width, height, ...], ...]}, MAttNet's detections

The published script also loads `cocos.json` and never looks at it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmat.data.annotations import field, pictures, read_json, read_plain_pickle
from fastmat.data.captions import CaptionRule, preprocess
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class GroundingSet:
    """N pairs of a picture and an expression. Boxes are x, y, width, height in pixels of the picture.

    pairs: row i is one pair; pairs of one picture are of one group. picture: [N] int64, equal where pairs share it.
    part: "val", "testA", ... per row. target: [N, 4]; boxes: per row [K, 4], what may be chosen, K = 0 where a detector
    found nothing; size: height, width.
    """

    pairs: RetrievalSet
    picture: Tensor
    part: tuple[str, ...]
    target: Tensor
    boxes: tuple[Tensor, ...]
    size: tuple[tuple[int, int], ...]


def read_grounding_set(
    annotations: Sequence[Path],
    *,
    refs: Path,
    instances: Path,
    detections: Path,
    images: Path,
    name: str,
    captions: CaptionRule = "albef",
) -> GroundingSet:
    """Raises UserError naming file and row: an unknown `ref_id`, no boxes, no picture, a key that is missing."""
    found = _by_id(_refs(refs), "ref_id", f"{refs}")
    content = read_json(instances, what="RefCOCO's instances")
    sizes, truth = (
        _by_id(field(content, key, list, f"{instances}"), "id", f"{instances}, {key}")
        for key in ("images", "annotations")
    )
    detected = read_json(detections, what="the boxes of a detector by image id")
    seen: Counter[int] = Counter()
    dense: dict[Any, int] = {}
    ids, texts, paths, places, part, target, boxes, size, picture = [], [], [], [], [], [], [], [], []
    for file in annotations:
        rows = read_json(file, what="a list of referring expressions")
        if not isinstance(rows, list) or not rows:
            raise UserError(
                f'{file}: expected a list of {{"image": ..., "text": ..., "ref_id": ...}} that is not empty'
            )
        for number, row in enumerate(rows, start=1):
            where = f"{file}, row {number}"
            ref_id = field(row, "ref_id", int, where)
            ref = _known(found, ref_id, f"{where}: ref_id {ref_id} is not in {refs}")
            image_id, ann_id = field(ref, "image_id", int, where), field(ref, "ann_id", int, where)
            about = _known(sizes, image_id, f"{where}: image {image_id} is not in {instances}")
            annotation = _known(truth, ann_id, f"{where}: annotation {ann_id} is not in {instances}")
            candidates = detected.get(str(image_id)) if isinstance(detected, dict) else None
            if not isinstance(candidates, list):
                raise UserError(f"{where}: {detections} has no boxes for image {image_id}; detect objects in it first")
            text = preprocess(field(row, "text", str, where), captions)
            if not text:
                raise UserError(f"{where}: nothing of {row['text']!r} is left by pre-processing '{captions}'")
            ids.append(f"{ref_id}/{seen[ref_id]}")
            seen[ref_id] += 1
            texts.append(text)
            paths.append(images / field(row, "image", str, where))
            places.append(where)
            part.append(field(ref, "split", str, where))
            target.append(_boxes([field(annotation, "bbox", list, where)], f"{where}: bbox of {instances}")[0])
            boxes.append(_boxes(candidates, f"{where}: a box of {detections}"))
            size.append((field(about, "height", int, where), field(about, "width", int, where)))
            picture.append(dense.setdefault(image_id, len(dense)))
    pairs = RetrievalSet(
        name=name,
        split="+".join(dict.fromkeys(part)),
        captions=tuple((text,) for text in texts),
        ids=tuple(ids),
        group=tuple(picture),
        load=pictures(paths, places),
    )
    return GroundingSet(
        pairs=pairs,
        picture=torch.tensor(picture),
        part=tuple(part),
        target=torch.stack(target),
        boxes=tuple(boxes),
        size=tuple(size),
    )


def _refs(path: Path) -> list[Any]:
    what = "the list of RefCOCO's referred objects"
    refs = read_json(path, what=what) if path.suffix == ".json" else read_plain_pickle(path, what=what)
    if not isinstance(refs, list):
        raise UserError(f"{path}: expected a list of objects with 'ref_id', got {type(refs).__name__}")
    return refs


def _by_id(rows: Sequence[Any], key: str, where: str) -> Mapping[int, Any]:
    return {field(row, key, int, f"{where}, entry {n}"): row for n, row in enumerate(rows, start=1)}


def _known(found: Mapping[int, Any], key: int, said: str) -> Any:
    if key not in found:
        raise UserError(f"{said}; take the files of one release")
    return found[key]


def _boxes(rows: Sequence[Any], where: str) -> Tensor:
    """[K, 4] float64. Whatever follows the four numbers, such as a score, is left out."""
    for row in rows:
        numbers = row[:4] if isinstance(row, list) else []
        if len(numbers) < 4 or not all(isinstance(value, int | float) for value in numbers) or min(numbers[2:]) <= 0:
            raise UserError(f"{where} must be [x, y, width, height] with a positive width and height, got {row!r}")
    return torch.tensor([row[:4] for row in rows], dtype=torch.float64).view(-1, 4)
