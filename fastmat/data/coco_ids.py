"""COCO's ids of the images and captions of a set, and ground truths that are written in them.

The field's own list (ALBEF/Karpathy) has no ids of captions. They are found by text: a caption of an image is the
caption of that image in COCO's own file that reads the same, under one of the rules of `fastmat.data.captions` and
apart from white space; of several that do, the one with the lowest id. Whatever is not found is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from fastmat.data.annotations import field, read_json
from fastmat.data.captions import CaptionRule, preprocess
from fastmat.data.retrieval import RetrievalSet
from fastmat.data.truth import Positives, Truth
from fastmat.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CocoIds:
    """image: COCO's id to the row; caption: COCO's id to the place, counted through the set; owner: place to row."""

    image: Mapping[int, int]
    caption: Mapping[int, int]
    owner: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Judgements:
    """A ground truth in COCO's ids. captions_of: image to its right captions; images_of: caption to its right images.

    images, captions: all that were judged, be they right for anything or not.
    """

    where: str
    captions_of: Mapping[int, Sequence[int]]
    images_of: Mapping[int, Sequence[int]]
    images: frozenset[int]
    captions: frozenset[int]


def coco_ids(dataset: RetrievalSet, captions: Path) -> CocoIds:
    """The ids of every image and caption of `dataset`.

    captions: COCO's own file (`captions_val2014.json`, the year whose ids the judgements have) or Karpathy's
    `dataset_coco.json`. An image's id is the number at the end of its `image_id` or file name.
    Raises UserError with a count where an image has no such number or a caption is not in the file.
    """
    texts_of: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for image, caption, text in _captions_in(captions):
        texts_of[image].append((caption, text))
    image_ids: dict[int, int] = {}
    caption_ids: dict[int, int] = {}
    owner: list[int] = []
    lost: list[str] = []
    for row, (name, own) in enumerate(zip(dataset.ids, dataset.captions, strict=True)):
        number = re.search(r"(\d+)(\.\w+)?$", name)
        if number is None:
            raise UserError(f"image '{name}' of {dataset.name}/{dataset.split} ends in no number, so it has no COCO id")
        image = int(number[1])
        if image_ids.setdefault(image, row) != row:
            raise UserError(
                f"images '{dataset.ids[image_ids[image]]}' and '{name}' would have the same COCO id, {image}"
            )
        free = dict(sorted(texts_of[image]))
        for text in own:
            found = next((key for key, other in free.items() if _reads_as(text, other)), None)
            if found is None:
                lost.append(f"image {image}, {text!r}")
            else:
                caption_ids[found] = len(owner)
                del free[found]
            owner.append(row)
    if lost:
        raise UserError(
            f"{len(lost):,} of {len(owner):,} captions of {dataset.name}/{dataset.split} are not in {captions} "
            f"(the first: {lost[0]}); name the captions of the split that the set is of"
        )
    return CocoIds(image=image_ids, caption=caption_ids, owner=owner)


def join(found: Judgements, dataset: RetrievalSet, *, captions: Path, partial: bool) -> Truth:
    """The judgements as a truth of `dataset`.

    COCO has more than five captions of some images, which were not judged: they query nothing and are right for their
    own image alone. partial: the set may be a part of what was judged; what refers to the rest is left out.
    Raises UserError where nothing joins, where an image of the set was not judged, where a query has nothing right,
    and, unless `partial`, where anything of the judgements is not in the set.
    """
    name = f"{dataset.name}/{dataset.split}"
    ids = coco_ids(dataset, captions)
    empty = [key for side in (found.captions_of, found.images_of) for key, right in side.items() if not right]
    if empty:
        raise UserError(
            f"{found.where}: nothing is right for {empty[0]} ({len(empty):,} such queries); remove the query"
        )
    strange = [image for image in ids.image if image not in found.images]
    if len(strange) == len(ids.image):
        raise UserError(f"{found.where} judges no image of {name}: it is of another set or split")
    if strange:
        raise UserError(
            f"{found.where} does not judge {len(strange):,} of the {len(ids.image):,} images of {name} (the first: "
            f"{strange[0]}), to which no answer would be right; evaluate the images that it judges"
        )
    sides = (
        _Side.of(found.captions_of, queries=ids.image, items=ids.caption, judged=(found.images, found.captions)),
        _Side.of(found.images_of, queries=ids.caption, items=ids.image, judged=(found.captions, found.images)),
    )
    absent, stray, pairs = (sum(getattr(side, name) for side in sides) for name in ("absent", "stray", "total"))
    if absent and not partial:
        raise UserError(
            f"{absent:,} of {pairs:,} judgements in {found.where} are of images or captions that {name} does not have; "
            "set partial: true where the set is a part of what was judged"
        )
    of_images, of_captions = (side.pairs for side in sides)
    if not of_images or not of_captions:
        raise UserError(f"{found.where} judges no {'caption' if of_images else 'image'} of {name} as a query")
    queries = {row for row, _ in of_images}
    more = [(ids.owner[place], place) for key, place in ids.caption.items() if key not in found.captions]
    of_images += [(row, place) for row, place in more if row in queries]
    rows, places = torch.tensor(of_images).unbind(1), torch.tensor(of_captions).unbind(1)
    truth = Truth(captions=Positives.of(*rows), images=Positives.of(*places))
    return Truth(
        captions=truth.captions,
        images=truth.images,
        told=f"{len(truth.captions):,} images with {len(truth.captions.items):,} right captions, "
        f"{len(truth.images):,} captions with {len(truth.images.items):,} right images; "
        f"{absent + stray:,} of {pairs:,} judgements left out, {len(more):,} captions not judged",
    )


@dataclass(frozen=True)
class _Side:
    """One direction, joined. pairs: (row or place of the query, of the item). total: pairs there were.

    absent: those that are not in the set; stray: those of them that refer to what was not even judged, as ECCV Caption
    does once or twice.
    """

    pairs: list[tuple[int, int]]
    total: int
    absent: int
    stray: int

    @classmethod
    def of(
        cls,
        right: Mapping[int, Sequence[int]],
        *,
        queries: Mapping[int, int],
        items: Mapping[int, int],
        judged: tuple[frozenset[int], frozenset[int]],
    ) -> _Side:
        every = [(query, item) for query, row in right.items() for item in row]
        pairs = [(queries[query], items[item]) for query, item in every if query in queries and item in items]
        missing = [pair for pair in every if pair[0] not in queries or pair[1] not in items]
        stray = sum(query not in judged[0] or item not in judged[1] for query, item in missing)
        return cls(pairs, len(every), len(missing) - stray, stray)


def _reads_as(text: str, original: str) -> bool:
    rules: tuple[CaptionRule, ...] = get_args(CaptionRule)
    return any(" ".join(text.split()) == " ".join(preprocess(original, rule).split()) for rule in rules)


def _captions_in(path: Path) -> Iterator[tuple[int, int, str]]:
    """(image, caption, text) of every caption in COCO's own file or in Karpathy's."""
    content = read_json(path, what="COCO's captions")
    if isinstance(content, dict) and "annotations" in content:
        for number, row in enumerate(field(content, "annotations", list, f"{path}"), start=1):
            where = f"{path}, annotation {number}"
            yield field(row, "image_id", int, where), field(row, "id", int, where), field(row, "caption", str, where)
        return
    for number, image in enumerate(field(content, "images", list, f"{path}"), start=1):
        where = f"{path}, image {number}"
        for row in field(image, "sentences", list, where):
            yield field(image, "cocoid", int, where), field(row, "sentid", int, where), field(row, "raw", str, where)
