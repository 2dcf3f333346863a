"""Visual entailment: does the picture entail the sentence, contradict it, or neither (SNLI-VE, Xie et al., 2019)?

    snli_ve_test.jsonl   one {"Flickr30K_ID", "gold_label", "sentence2", "pairID", ...} a line, the data set's own
    ve_test.json         [{"image", "sentence", "label"}, ...], the list that ALBEF's scripts read

Pictures are Flickr30k's, `ID.jpg`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmat.data.annotations import field, pictures, read_json, read_json_lines
from fastmat.data.captions import CaptionRule, preprocess
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError, nearest

# In the order of the classes of ALBEF's head.
LABELS = ("contradiction", "neutral", "entailment")
UNDECIDED = "-"  # SNLI's label where its annotators do not agree; such pairs are not to be judged
KEYS = {".jsonl": ("Flickr30K_ID", "sentence2", "gold_label")}
ALBEF_KEYS = ("image", "sentence", "label")


@dataclass(frozen=True, kw_only=True, eq=False)
class EntailmentSet:
    """pairs: N pairs of picture and sentence, those of one picture in one group. label: [N] int64, into `LABELS`."""

    pairs: RetrievalSet
    label: Tensor


def read_entailment_set(
    annotations: Path, images: Path, *, name: str, split: str, captions: CaptionRule = "albef"
) -> EntailmentSet:
    """A `.jsonl` file in SNLI-VE's format, or a `.json` list in ALBEF's. Raises UserError naming file and place."""
    image_key, sentence_key, label_key = KEYS.get(annotations.suffix, ALBEF_KEYS)
    ids, paths, places, texts, labels = [], [], [], [], []
    group: dict[str, int] = {}
    seen: Counter[str] = Counter()
    for where, row in _rows(annotations):
        named = field(row, label_key, str, where)
        if named == UNDECIDED:
            continue
        if named not in LABELS:
            raise UserError(f"{where}: unknown label '{named}'{nearest(named, LABELS)}")
        picture = str(row.get(image_key) or field(row, image_key, str, where))
        text = preprocess(field(row, sentence_key, str, where), captions)
        if not text:
            raise UserError(f"{where}: nothing of {row[sentence_key]!r} is left by pre-processing '{captions}'")
        group.setdefault(picture, len(group))
        called = str(row.get("pairID", picture))
        ids.append(f"{called}/{seen[called]}" if called in seen or "pairID" not in row else called)
        seen[called] += 1
        paths.append(images / f"{picture.removesuffix('.jpg')}.jpg")
        places.append(where)
        texts.append((text,))
        labels.append((LABELS.index(named), group[picture]))
    if not ids:
        raise UserError(f"{annotations}: there is no pair with a label in it")
    pairs = RetrievalSet(
        name=name,
        split=split,
        captions=tuple(texts),
        ids=tuple(ids),
        group=tuple(of for _, of in labels),
        load=pictures(paths, places),
    )
    return EntailmentSet(pairs=pairs, label=torch.tensor([label for label, _ in labels]))


def _rows(path: Path) -> list[tuple[str, Any]]:
    what = "pairs of picture and sentence with a label"
    if path.suffix == ".jsonl":
        return read_json_lines(path, what=what)
    rows = read_json(path, what=what)
    if not isinstance(rows, list):
        raise UserError(f'{path}: expected a list of {{"image": ..., "sentence": ..., "label": ...}}')
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]
