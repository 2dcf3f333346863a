"""What a fusion model fuses in a training step: images and texts of this process, and rows borrowed of all others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmat.defences.base import Pairs, Views
from fastmat.models.protocol import Encoded, ImageState, TextState
from fastmat.training.outer import taken
from fastmat.training.peers import Peers


def to_fuse(
    encoded: Encoded, views: Views, chosen: Collection[Pairs], peers: Peers, texts: tuple[int, ...]
) -> tuple[ImageState, TextState, Tensor]:
    """Images, P texts and the image row [P] of each text, of all `chosen`, one after the other.

    encoded: the stacked `views`. texts: how many each process has, by rank. What is borrowed is gathered once for all
    of `chosen`, and gradients go back to the process that it is of.
    """
    image, text = encoded.image, encoded.text
    assert image is not None and image.tokens is not None and text is not None
    images = (len(image.tokens) // len(views.images),) * peers.world
    of_images = [Asked(pairs.images, pairs.image_rows, pairs.borrowed_images) for pairs in chosen]
    of_texts = [Asked(pairs.texts, pairs.text_rows, pairs.borrowed_texts) for pairs in chosen]
    image = image._replace(tokens=with_borrowed(image.tokens, views.images, of_images, peers, images))
    text = text._replace(
        ids=with_borrowed(text.ids, views.texts, of_texts, peers, texts),
        mask=with_borrowed(text.mask, views.texts, of_texts, peers, texts),
        tokens=None if text.tokens is None else with_borrowed(text.tokens, views.texts, of_texts, peers, texts),
    )
    rows = stacked_rows(views.texts, of_texts, texts[peers.rank])
    return image, taken(text, rows), stacked_rows(views.images, of_images, images[peers.rank])


class Asked(NamedTuple):
    """Rows of a view and of what is borrowed for it, as in `fastmat.defences.base.Pairs`."""

    view: str
    rows: Tensor
    borrowed: Tensor | None


def stacked_rows(views: Iterable[str], asked: Sequence[Asked], count: int) -> Tensor:
    """[P], the rows in what `with_borrowed` makes of stacked views of `count` rows each."""
    start = {view: i * count for i, view in enumerate(views)}
    end = len(start) * count
    found = []
    for view, rows, borrowed in asked:
        own = start[view] + rows
        found.append(own if borrowed is None else torch.where(rows < count, own, end + rows - count))
        end += 0 if borrowed is None else len(borrowed)
    return torch.cat(found)


def with_borrowed(
    stacked: Tensor, views: Iterable[str], asked: Sequence[Asked], peers: Peers, counts: tuple[int, ...]
) -> Tensor:
    """`stacked` [V * N, ...] and below it what is borrowed, in order. counts: N of every process, by rank."""
    if all(one.borrowed is None for one in asked):
        return stacked
    parts = stacked.split(counts[peers.rank])
    every = dict(zip(views, peers.rows(parts, [counts] * len(parts)), strict=True))
    return torch.cat([stacked, *(every[one.view][one.borrowed] for one in asked if one.borrowed is not None)])
