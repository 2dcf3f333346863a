"""Some images of a data set as queries, all of them as gallery: for attacks too slow for every image.

Only the chosen images and their captions are attacked; everything else in the gallery stays clean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fastmat.data.loader import EvaluationBatches
from fastmat.data.retrieval import RetrievalSet
from fastmat.data.truth import Truth
from fastmat.errors import UserError
from fastmat.evaluation.evaluate import Attacked, Gallery, Measured, captions_of, encode_gallery, gallery_ranks, row_of
from fastmat.evaluation.metrics import Ranks
from fastmat.evaluation.results import Row, Setting
from fastmat.models.protocol import VisionLanguageModel


def draw_rows(n: int, count: int, *, seed: int) -> tuple[int, ...]:
    """`count` of `n` rows, ascending; a smaller draw is part of every larger one.

    >>> draw_rows(5, 5, seed=0), set(draw_rows(100, 3, seed=1)) < set(draw_rows(100, 9, seed=1))
    ((0, 1, 2, 3, 4), True)
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return tuple(order[:count].sort().values.tolist())


def pick(dataset: RetrievalSet, rows: Sequence[int]) -> RetrievalSet:
    """Ids, captions and groups of `rows`; its pictures are loaded through the whole set (`picked`)."""
    return dataclasses.replace(
        dataset,
        captions=tuple(dataset.captions[row] for row in rows),
        ids=tuple(dataset.ids[row] for row in rows),
        group=tuple(dataset.group[row] for row in rows),
        provenance=tuple(dataset.provenance[row] for row in rows) if dataset.provenance else (),
    )


@dataclass(frozen=True)
class PickedBatches(EvaluationBatches):
    """Batches of the rows in `plan`, which keep their places in the whole set as `index`: draws are keyed by it."""

    plan: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.plan)

    def _rows(self) -> Iterator[list[int]]:
        return map(list, self.plan)


def picked(batches: EvaluationBatches, rows: Sequence[int], *, share: int = 0, of: int = 1) -> PickedBatches:
    """`rows` cut into batches, of which this is every `of`-th, from number `share` on."""
    size = batches.batch_size
    plan = tuple(tuple(rows[start : start + size]) for start in range(0, len(rows), size))
    fields = {field.name: getattr(batches, field.name) for field in dataclasses.fields(EvaluationBatches)}
    return PickedBatches(**fields, plan=plan[share::of])


def evaluate_subset(
    victim: VisionLanguageModel,
    attacked: Iterable[Attacked],
    *,
    clean: Gallery,
    rows: Sequence[int],
    setting: Setting,
    resamples: int = 1000,
) -> Row:
    """Judge `victim` on attacked images `rows` (ascending) and their captions, in a gallery otherwise clean.

    clean: the victim's whole clean gallery; with its second stage the attacked queries are ranked too. All rates are
    those of the attacked queries.
    """
    ranks, measured = attacked_subset_ranks(victim, attacked, clean=clean, rows=rows)
    return row_of(
        ranks,
        gallery_ranks(clean, rows),
        setting=setting,
        resamples=resamples,
        measured=measured,
        gallery_images=len(clean.image_features),
    )


def attacked_subset_ranks(
    victim: VisionLanguageModel,
    attacked: Iterable[Attacked],
    *,
    clean: Gallery,
    rows: Sequence[int],
    truths: Mapping[str, Truth] | None = None,
) -> tuple[Ranks, Measured]:
    """The ranks behind such a row, also under other ground truths, and what passed by.

    Raises UserError unless `rows` are what was attacked.
    """
    measured = Measured()
    held = clean.matching
    part = encode_gallery(victim, measured.watch(attacked), rerank=held.rerank if held else None)
    chosen = torch.tensor(rows, device=clean.image_features.device)
    captions = captions_of(clean, chosen)
    if len(part.image_features) != len(chosen) or len(part.text_features) != len(captions):
        raise UserError(
            f"the attacked data ({len(part.image_features)} images, {len(part.text_features)} captions) is not the "
            f"subset ({len(chosen)} images, {len(captions)} captions)"
        )
    after = dataclasses.replace(
        clean,
        image_features=clean.image_features.index_copy(0, chosen, part.image_features),
        text_features=clean.text_features.index_copy(0, captions, part.text_features),
        matching=held.overlaid(part.matching, chosen, captions) if held and part.matching else None,
    )
    return gallery_ranks(after, rows, truths=truths), measured
