"""Ground truths: which captions are right for an image, and which images for a caption.

The pairs that a set was collected with leave out most of what is right: on COCO's test split ECCV Caption finds 3.6
times as many right captions and 8.5 times as many right images (Chun et al., ECCV 2022, abstract). A `Truth` holds any
number per query, and may judge some of the queries only; the gallery is the whole set under each of them.

Attacks know the original pairs alone: an adversarial image is driven away from its own captions, not from every caption
that is right for it, so what a truth finds left after an attack is an upper bound on what an attack made against that
truth would leave.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError

# Behind the label of a truth: the original pairs, of the same queries.
PAIRS = "/pairs"


@dataclass(frozen=True, kw_only=True, eq=False)
class Positives:
    """The right items of Q queries, sparse; int64 on the CPU.

    queries [Q]: ascending. count [Q]: right items of each, at least one. items [count.sum()]: theirs, query by query,
    ascending.
    """

    queries: Tensor
    count: Tensor
    items: Tensor

    @classmethod
    def of(cls, queries: Tensor, items: Tensor) -> Positives:
        """From P pairs [P] in any order, each as often as it likes.

        >>> right = Positives.of(torch.tensor([7, 2, 2, 7]), torch.tensor([1, 5, 0, 1]))
        >>> right.queries.tolist(), right.count.tolist(), right.items.tolist()
        ([2, 7], [2, 1], [0, 5, 1])
        """
        span = int(items.max()) + 1 if len(items) else 1
        pairs = (queries * span + items).unique()
        found, count = (pairs // span).unique_consecutive(return_counts=True)
        return cls(queries=found, count=count, items=pairs % span)

    def __len__(self) -> int:
        return len(self.queries)

    def take(self, queries: Tensor) -> Positives:
        """Those of the queries that are among `queries`, in any order."""
        kept = torch.isin(self.queries, queries)
        return Positives(
            queries=self.queries[kept],
            count=self.count[kept],
            items=self.items[kept.repeat_interleave(self.count)],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """captions: rows of images to places of captions; images: places of captions to rows of images.

    The place of a caption counts through the set, image by image. told: how it came about, for the reader.
    """

    captions: Positives
    images: Positives
    told: str = ""

    def like(self, other: Truth) -> Truth:
        """The part of it that has the queries of `other`."""
        return Truth(
            captions=self.captions.take(other.captions.queries),
            images=self.images.take(other.images.queries),
            told=self.told,
        )

    def fingerprint(self) -> str:
        """SHA-256: equal fingerprints mean the same judgements."""
        parts = (part for side in (self.captions, self.images) for part in (side.queries, side.count, side.items))
        return hashlib.sha256(b"".join(part.numpy().tobytes() + b"|" for part in parts)).hexdigest()


def truth_of(pairs: Iterable[tuple[int, int]], told: str = "") -> Truth:
    """Of (row of an image, place of a caption) that match, every one of which queries."""
    rows, places = torch.tensor(sorted(set(pairs)), dtype=torch.int64).reshape(-1, 2).unbind(1)
    return Truth(captions=Positives.of(rows, places), images=Positives.of(places, rows), told=told)


def original_pairs(dataset: RetrievalSet) -> Truth:
    """The pairs that the set came with: a caption matches the images of its own image's group."""
    images_of: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(dataset.group):
        images_of[group].append(row)
    owner = (row for row, captions in enumerate(dataset.captions) for _ in captions)
    return truth_of((row, place) for place, own in enumerate(owner) for row in images_of[dataset.group[own]])


def same_captions(*, dataset: RetrievalSet) -> Truth:
    """An image and a caption match where one of the image's captions reads the same, or where their groups are equal.

    For sets with several images of one description or of one class.
    Raises UserError where no two images share either, so that the truth would be the original pairs.
    """
    images_of: dict[str, set[int]] = defaultdict(set)
    for row, captions in enumerate(dataset.captions):
        for text in captions:
            images_of[text].add(row)
    texts = [text for captions in dataset.captions for text in captions]
    if all(len(rows) == 1 for rows in images_of.values()) and len(set(dataset.group)) == dataset.n_images:
        raise UserError(
            f"no two images of {dataset.name}/{dataset.split} have a caption or a group in common, so that this truth "
            "would be the original pairs; leave it out, or name annotations that judge more"
        )
    same = {(row, place) for place, text in enumerate(texts) for row in images_of[text]}
    pairs = original_pairs(dataset).captions
    same |= set(zip(pairs.queries.repeat_interleave(pairs.count).tolist(), pairs.items.tolist(), strict=True))
    return truth_of(
        same, f"{len(same):,} pairs of equal captions or groups, of which {len(pairs.items):,} are original"
    )


def beside_pairs(dataset: RetrievalSet, truths: Mapping[str, Truth]) -> dict[str, Truth]:
    """Every truth, and beside it, under its label and `PAIRS`, the original pairs of the same queries."""
    made: dict[str, Truth] = {}
    pairs = original_pairs(dataset) if truths else None
    for label, truth in truths.items():
        assert pairs is not None
        made |= {label: truth, label + PAIRS: pairs.like(truth)}
    return made
