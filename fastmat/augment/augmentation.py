"""MAT+: one-to-many pairs per step, as a config describes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastmat.attacks.draws import Draws
from fastmat.augment.captions import CaptionDraw, CaptionPool
from fastmat.augment.image import ImageViews
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError
from fastmat.types import Batch

Augment = Callable[[Batch, Draws], Batch]


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """captions: per image and step, drawn anew in place of captions_per_image; null: those stay, whoever wrote them.
    generated: the share of them that is generated, where the data is an augmented set; 0: human captions only.
    views: images added per image, by a random crop and RandAugment; keep_images: false: the first view of each image
        takes its place.
    crop: smallest and largest share of the area; operations, magnitude (0 to 1): RandAugment's N and M.
    """

    captions: int | None = None
    generated: float = 0.0
    views: int = 0
    keep_images: bool = True
    crop: tuple[float, float] = (0.5, 1.0)
    operations: int = 2
    magnitude: float = 0.7

    def __post_init__(self) -> None:
        if self.captions is not None and self.captions < 1:
            raise UserError(f"captions must be at least 1 or null, got {self.captions}")
        if self.captions is None and self.generated:
            raise UserError(f"generated={self.generated} is a share of captions: set captions to a number, too")
        if self.views < 0:
            raise UserError(f"views must not be negative, got {self.views}")
        if not self.views and not self.keep_images:
            raise UserError("keep_images: false leaves no image without views: set views to 1 or more")
        self.image_views()

    def image_views(self) -> ImageViews | None:
        if not self.views:
            return None
        return ImageViews(
            views=self.views,
            keep=self.keep_images,
            crop=self.crop,
            operations=self.operations,
            magnitude=self.magnitude,
        )


def augmentation(settings: AugmentSettings, dataset: RetrievalSet | None) -> Augment | None:
    """What `train(..., augment=...)` calls on every process's batch before the attack; None where nothing is to do.

    A pure function of batch and draws. Equally many images and captions come out for every process, if `captions` is
    set or the batches bring equally many. dataset: whose positions `Batch.index` holds; None: a stream, whose captions
    are not all at hand.
    Raises UserError for captions of a stream, and for a share of generated captions in a set that has none.
    """
    parts: list[Augment] = []
    if settings.captions is not None:
        if dataset is None:
            raise UserError("captions are drawn from a whole set, not from shards; use captions_per_image with them")
        pool = CaptionPool.of(dataset)
        parts.append(CaptionDraw(pool=pool, number=settings.captions, generated=settings.generated))
    views = settings.image_views()
    if views is not None:
        parts.append(views)
    if not parts:
        return None

    def augment(batch: Batch, draws: Draws) -> Batch:
        for part in parts:
            batch = part(batch, draws)
        return batch

    return augment
