"""Crisscrossed Captions (Parekh et al., EACL 2021, arXiv 2004.15020): how well pairs of COCO fit, rated from 0 to 5."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path

from fastmat.data.coco_ids import Judgements, join
from fastmat.data.retrieval import RetrievalSet
from fastmat.data.truth import Truth
from fastmat.errors import UserError

COLUMNS = ("caption", "image", "agg_score", "sampling_method")
THRESHOLD = 3.0  # of image-caption pairs, section 3 of the paper
ORIGINAL = "c2i_original"


def read_cxc(
    *,
    ratings: Path,
    captions: Path,
    dataset: RetrievalSet,
    threshold: float = THRESHOLD,
    keep_original: bool = True,
    partial: bool = False,
) -> Truth:
    """Ratings of image-caption pairs, `sits_test.csv` or `sits_val.csv` (github.com/google-research-datasets).

    ratings: a CSV file with the columns caption, image, agg_score, sampling_method.
    captions: COCO's `captions_val2014.json` or Karpathy's `dataset_coco.json`, by whose texts captions find their ids.
    threshold: a pair is right from this rating on; the paper's is 3.
    keep_original: original pairs are right whatever their rating; false: only what reaches the threshold, as the
        package `eccv_caption` counts, which drops 29 pairs of the test split and 28 of its captions as queries.
    partial: the set may be a part of the split, as with `limit`; what refers to the rest is left out.
    Raises UserError as `fastmat.data.coco_ids.join`, and naming file and line for what has another form.
    """
    captions_of: dict[int, list[int]] = defaultdict(list)
    images_of: dict[int, list[int]] = defaultdict(list)
    images, judged = set(), set()
    for caption, image, rating, method in _ratings(Path(ratings)):
        images.add(image)
        judged.add(caption)
        if rating >= threshold or (keep_original and method == ORIGINAL):
            captions_of[image].append(caption)
            images_of[caption].append(image)
    if not captions_of:
        raise UserError(f"{ratings}: no pair is rated {threshold:g} or more; lower threshold")
    found = Judgements(
        where=f"{ratings}",
        captions_of=captions_of,
        images_of=images_of,
        images=frozenset(images),
        captions=frozenset(judged),
    )
    return join(found, dataset, captions=captions, partial=partial)


def _ratings(path: Path) -> list[tuple[int, int, float, str]]:
    """(caption, image, rating, method) of every line, as `COCO_val2014:sentid:1`, `COCO_val2014_000000000002.jpg`."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected ratings of image-caption pairs, sits_test.csv") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from None
    if not lines or tuple(lines[0]) != COLUMNS:
        raise UserError(f"{path}: the first line must be {','.join(COLUMNS)}; name a sits_*.csv file, not a *_raw.csv")
    return [_rating(line, f"{path}, line {number}") for number, line in enumerate(lines[1:], start=2)]


def _rating(line: list[str], where: str) -> tuple[int, int, float, str]:
    try:
        caption, image, rating, method = line
        ids = re.search(r":(\d+)$", caption), re.search(r"_(\d+)\.\w+$", image)
        assert ids[0] is not None and ids[1] is not None
        return int(ids[0][1]), int(ids[1][1]), float(rating), method
    except (ValueError, AssertionError):
        raise UserError(f"{where}: expected {','.join(COLUMNS)}, got {','.join(line)!r}") from None
