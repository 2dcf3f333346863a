"""Batches out of a retrieval set: in order for evaluation, seeded draws for training, decoded in worker processes.

Workers hand over 8-bit pixels, a quarter of the traffic; the parent makes fp32 in [0, 1] of them. With an image cache
(`fastmat.data.image_cache`) pictures are decoded once, and read after that; the batches are the same.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastmat.data.image_cache import open_image_cache
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError
from fastmat.types import Batch, ImageTransform

Picture = Callable[[int], Tensor]


@dataclass(frozen=True)
class EvaluationBatches:
    """Every image once, in order, with all its captions. Sized; can be iterated again."""

    dataset: RetrievalSet
    transform: ImageTransform
    batch_size: int
    workers: int
    image_cache: Path | None

    def __len__(self) -> int:
        return -(-self.dataset.n_images // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for rows, images in zip(self._rows(), _decode(self, self._rows), strict=True):
            yield _assemble(self.dataset, rows, images, [self.dataset.captions[row] for row in rows])

    def _rows(self) -> Iterator[list[int]]:
        n = self.dataset.n_images
        return (list(range(start, min(start + self.batch_size, n))) for start in range(0, n, self.batch_size))

    @cached_property
    def picture(self) -> Picture:
        return _picture(self.dataset, self.transform, self.workers, self.image_cache)


def evaluation_batches(
    dataset: RetrievalSet,
    transform: ImageTransform,
    *,
    batch_size: int,
    workers: int = 0,
    image_cache: Path | None = None,
) -> EvaluationBatches:
    """Batches of `batch_size` images (the last may be smaller); `workers` processes decode, 0: this one does.

    image_cache: a folder for decoded images; filled at the first iteration where it has no such images.
    """
    _check(batch_size, workers)
    return EvaluationBatches(dataset, transform, batch_size, workers, image_cache)


class TrainingBatches:
    """`batch(step)` depends on (seed, step) alone, so that training resumes anywhere.

    Every epoch is a new permutation of the images, cut into `steps_per_epoch` batches of distinct images; what is left
    over is dropped. Each image brings `captions_per_image` of its captions, drawn without replacement (all it has,
    where it has fewer). image_cache: as in `evaluation_batches`; filled when a batch is first asked for.
    """

    def __init__(
        self,
        dataset: RetrievalSet,
        transform: ImageTransform,
        *,
        batch_size: int,
        captions_per_image: int = 1,
        seed: int,
        workers: int = 0,
        image_cache: Path | None = None,
    ) -> None:
        _check(batch_size, workers)
        if batch_size > dataset.n_images:
            raise UserError(
                f"batch_size {batch_size} is more than the {dataset.n_images} images of {dataset.name}/{dataset.split}"
            )
        if captions_per_image < 1:
            raise UserError(f"captions_per_image must be at least 1, got {captions_per_image}")
        if seed < 0:
            raise UserError(f"seed must not be negative, got {seed}")
        self.dataset = dataset
        self.transform = transform
        self.batch_size = batch_size
        self.captions_per_image = captions_per_image
        self.seed = seed
        self.workers = workers
        self.image_cache = image_cache
        self.steps_per_epoch = dataset.n_images // batch_size
        # Consecutive steps share an epoch; two, because workers may already ask for the next one.
        self._order = lru_cache(maxsize=2)(self._permutation)

    def batch(self, step: int) -> Batch:
        """The batch of `step` (from 0), decoded here."""
        rows = self._rows(step)
        images = torch.stack([self.picture(row) for row in rows])
        return self._assemble(step, slice(None), images)

    def iterate(self, start: int, stop: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The share of process `rank` out of `world` in `batch(start)` ... `batch(stop - 1)`: consecutive images.

        Decoded ahead of time by the workers, and no other process's images. Raises UserError at once where the batch
        cannot be divided.
        """
        own = own_share(self.batch_size, rank=rank, world=world)

        def batches() -> Iterator[Batch]:
            decoded = _decode(self, lambda: (self._rows(step)[own] for step in range(start, stop)))
            for step, images in zip(range(start, stop), decoded, strict=True):
                yield self._assemble(step, own, images)

        return batches()

    @cached_property
    def picture(self) -> Picture:
        return _picture(self.dataset, self.transform, self.workers, self.image_cache)

    def _permutation(self, epoch: int) -> list[int]:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(self.dataset.n_images).tolist()

    def _rows(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def _assemble(self, step: int, own: slice, images: Tensor) -> Batch:
        """The images `own` of a step; captions are drawn for all of them, so that a share has those of the whole."""
        rows = self._rows(step)
        rng = np.random.default_rng([self.seed, 1, step])
        captions = []
        for row in rows:
            known = self.dataset.captions[row]
            drawn = rng.permutation(len(known))[: self.captions_per_image]
            captions.append(tuple(known[i] for i in drawn))
        return _assemble(self.dataset, rows[own], images, captions[own])


def own_share(batch_size: int, *, rank: int, world: int) -> slice:
    """The consecutive images of a batch that process `rank` out of `world` reads. Raises UserError for a remainder."""
    if batch_size % world:
        raise UserError(
            f"the batch of {batch_size} images cannot be divided among {world} processes; "
            f"set batch_size to a multiple of {world}"
        )
    share = batch_size // world
    return slice(rank * share, (rank + 1) * share)


def _check(batch_size: int, workers: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if workers < 0:
        raise UserError(f"workers must not be negative, got {workers}")


def _assemble(dataset: RetrievalSet, rows: list[int], images: Tensor, captions: Sequence[tuple[str, ...]]) -> Batch:
    counts = torch.tensor([len(own) for own in captions])
    return Batch(
        images=images.float().div_(255),
        texts=tuple(itertools.chain.from_iterable(captions)),
        txt2img=torch.arange(len(rows)).repeat_interleave(counts),
        index=torch.tensor(rows),
        group=torch.tensor([dataset.group[row] for row in rows]),
    )


def _picture(dataset: RetrievalSet, transform: ImageTransform, workers: int, folder: Path | None) -> Picture:
    """Row to uint8 [3, S, S], by decoding or, below `folder`, out of a cache that is made first where it is missing."""
    decoded = Decoded(dataset.load, transform)
    if folder is None:
        return decoded
    rows = ([row] for row in range(dataset.n_images))
    return open_image_cache(folder, dataset, transform, lambda: _read(decoded, workers, lambda: rows))


def _decode(batches: EvaluationBatches | TrainingBatches, rows: Callable[[], Iterable[list[int]]]) -> Iterator[Tensor]:
    """uint8 [B, 3, H, W] for each list of rows, in order."""
    return _read(batches.picture, batches.workers, rows)


def _read(picture: Picture, workers: int, rows: Callable[[], Iterable[list[int]]]) -> Iterator[Tensor]:
    loader = DataLoader(
        _Pictures(picture),
        batch_sampler=_Plan(rows),
        num_workers=workers,
        collate_fn=_stack,
        worker_init_fn=leave_interrupts_to_parent,
        generator=torch.Generator(),  # else every iteration takes a number from the global stream
    )
    for images in loader:
        # An exception would come out of a worker wrapped in its traceback, so the worker sends it as a value.
        if isinstance(images, UserError):
            raise images
        yield images


@dataclass(frozen=True)
class Decoded:
    """Row to uint8 [3, S, S], out of the picture."""

    load: Callable[[int], Image.Image]
    transform: ImageTransform

    def __call__(self, row: int) -> Tensor:
        return self.transform(self.load(row))


class _Pictures(Dataset[Tensor | UserError]):
    def __init__(self, picture: Picture) -> None:
        self.picture = picture

    def __getitem__(self, row: int) -> Tensor | UserError:
        try:
            return self.picture(row)
        except UserError as error:
            return error


@dataclass(frozen=True)
class _Plan:
    """What DataLoader wants of a batch sampler, over lists of rows made as they are needed."""

    rows: Callable[[], Iterable[list[int]]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.rows())


def _stack(pictures: list[Tensor | UserError]) -> Tensor | UserError:
    errors = [picture for picture in pictures if isinstance(picture, UserError)]
    return errors[0] if errors else torch.stack(pictures)  # type: ignore[arg-type]


def leave_interrupts_to_parent(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the parent finishes its batch, so its workers must live on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
