"""Training batches streamed out of WebDataset shards, from sets that do not fit in memory.

The `webdataset` library's own reader hands out whole shards to processes and workers, shuffles through a buffer with
a state, and starts a shard at its beginning: with shards of unequal size somebody repeats or loses samples, and to
resume in an epoch is to read it again up to there. Here the index says where every sample lies, so that a batch is a
function of (seed, step) and a read is a seek: any process reads its slice of any step, and nothing else. The files
are that library's, so that each can read what was written for the other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastmat.data.captions import CaptionRule
from fastmat.data.images import decode_image
from fastmat.data.loader import leave_interrupts_to_parent, own_share
from fastmat.data.shard_index import INDEX, SAMPLES, Shard, read_index, read_samples, texts_of
from fastmat.errors import UserError
from fastmat.types import Batch, ImageTransform

OPEN_FILES = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardSet:
    """N samples in the shards of a folder, in the order of the index. Small, whatever N: workers read the table.

    captions: pre-processing. shuffle_buffer: samples that are shuffled among one another.
    """

    folder: Path
    shards: tuple[Shard, ...]
    samples_sha256: str
    captions: CaptionRule
    shuffle_buffer: int

    @property
    def n_images(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def take(self, n: int) -> ShardSet:
        """The first `n` samples. Raises UserError unless 1 <= n <= n_images."""
        if not 1 <= n <= self.n_images:
            raise UserError(f"the shards of {self.folder} have {self.n_images} images, cannot take {n}")
        before = [0, *itertools.accumulate(shard.samples for shard in self.shards)]
        kept = [max(0, min(shard.samples, n - first)) for shard, first in zip(self.shards, before, strict=False)]
        shards = (shard.model_copy(update={"samples": k}) for shard, k in zip(self.shards, kept, strict=True))
        return replace(self, shards=tuple(shards))

    def fingerprint(self) -> str:
        """SHA-256 of the shards' own: equal fingerprints mean the same samples in the same order."""
        shards = [[shard.sha256, shard.samples] for shard in self.shards]
        return hashlib.sha256(json.dumps([self.samples_sha256, shards]).encode()).hexdigest()


def open_shards(*, index: Path, captions: CaptionRule = "none", shuffle_buffer: int = 10_000) -> ShardSet:
    """WebDataset shards, streamed; for training.

    index: the folder's index.json, which `fastmat pack` writes with the shards, or without: `fastmat pack --index DIR`.
    captions: pre-processing; "albef": lower case, punctuation removed; "blip": lower case, some punctuation to blanks;
        both keep 30 words.
    shuffle_buffer: samples that are shuffled among one another; the more of them, the more shards are read at a time.
    """
    if shuffle_buffer < 1:
        raise UserError(f"shuffle_buffer must be at least 1, got {shuffle_buffer}")
    file = index / INDEX if index.is_dir() else index
    read = read_index(file)
    return ShardSet(
        folder=file.parent,
        shards=read.shards,
        samples_sha256=read.samples_sha256,
        captions=captions,
        shuffle_buffer=shuffle_buffer,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Shuffle:
    """The order of an epoch, a function of (seed, epoch) that can be asked for any stretch of it.

    The shards are put in another order and read one after the other; of this stream every `buffer` samples are put in
    another order among themselves. counts: samples of each shard.
    """

    counts: tuple[int, ...]
    buffer: int
    seed: int

    def samples(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """[stop - start] int64, the samples at the places `start:stop` of an epoch, numbered in set order."""
        first, ends, total = _streamed(self, epoch)
        places = []
        for window in range(start // self.buffer, -(-stop // self.buffer)):
            begin = window * self.buffer
            inside = slice(max(start - begin, 0), stop - begin)
            places.append(begin + _permuted(self, epoch, window, min(self.buffer, total - begin))[inside])
        stream = np.concatenate(places)
        return stream + first[np.searchsorted(ends, stream, side="right")]


@lru_cache(maxsize=2)  # workers may already ask for the next epoch
def _streamed(shuffle: Shuffle, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Per shard in the epoch's order: what to add to a place in the stream to have the sample, and where it ends."""
    counts = np.array(shuffle.counts, dtype=np.int64)
    order = np.random.default_rng([shuffle.seed, 0, epoch]).permutation(len(counts))
    ends = counts[order].cumsum()
    return (counts.cumsum() - counts)[order] - (ends - counts[order]), ends, int(counts.sum())


@lru_cache(maxsize=4)
def _permuted(shuffle: Shuffle, epoch: int, window: int, size: int) -> np.ndarray:
    return np.random.default_rng([shuffle.seed, 1, epoch, window]).permutation(size)


class ShardBatches:
    """Batches of a `ShardSet`, each a function of (seed, step) alone, so that training resumes anywhere.

    Every epoch is another order of the samples (`Shuffle`), cut into `steps_per_epoch` batches of distinct images;
    what is left over is dropped. Each image brings `captions_per_image` of its captions, drawn without replacement
    (all it has, where it has fewer). `workers` processes read and decode ahead of time, 0: this one does.
    """

    def __init__(
        self,
        dataset: ShardSet,
        transform: ImageTransform,
        *,
        batch_size: int,
        captions_per_image: int = 1,
        seed: int,
        workers: int = 0,
    ) -> None:
        whole = {"batch_size": (batch_size, 1), "captions_per_image": (captions_per_image, 1)}
        for name, (value, least) in (whole | {"seed": (seed, 0), "workers": (workers, 0)}).items():
            if value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        if batch_size > dataset.n_images:
            raise UserError(
                f"batch_size {batch_size} is more than the {dataset.n_images} images in the shards of {dataset.folder}"
            )
        self.dataset = dataset
        self.transform = transform
        self.batch_size = batch_size
        self.captions_per_image = captions_per_image
        self.seed = seed
        self.workers = workers
        self.steps_per_epoch = dataset.n_images // batch_size
        counts = tuple(shard.samples for shard in dataset.shards)
        self.shuffle = Shuffle(counts=counts, buffer=dataset.shuffle_buffer, seed=seed)
        self.first = np.array([0, *itertools.accumulate(shard.samples for shard in dataset.shards)])

    def iterate(self, start: int, stop: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The share of process `rank` out of `world` in the batches of the steps `start:stop`: consecutive images.

        No other process's images are read; there may be more processes than shards. Raises UserError at once where
        the batch cannot be divided, and, when it is read, for a sample that differs from its checksum.
        """
        return self._loaded(range(start, stop), own_share(self.batch_size, rank=rank, world=world))

    def _loaded(self, steps: range, own: slice) -> Iterator[Batch]:
        loader = DataLoader(
            _Shares(self, own),
            batch_size=None,  # an item is a batch already
            sampler=steps,
            num_workers=self.workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # of one item, not of a list
            worker_init_fn=leave_interrupts_to_parent,
            generator=torch.Generator(),  # else every iteration takes a number from the global stream
        )
        for batch in loader:
            # An exception would come out of a worker wrapped in its traceback, so the worker sends it as a value.
            if isinstance(batch, UserError):
                raise batch
            yield batch.replace(images=batch.images.float().div_(255))

    def read(self, step: int, own: slice) -> Batch:
        """The images `own` of a step, in uint8: a quarter of the traffic between processes."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.batch_size
        rows = self.shuffle.samples(epoch, start + own.start, start + own.stop).tolist()
        images, captions, groups = zip(*(self._sample(row, epoch) for row in rows), strict=True)
        return Batch(
            images=torch.stack(images),
            texts=tuple(itertools.chain.from_iterable(captions)),
            txt2img=torch.arange(len(rows)).repeat_interleave(torch.tensor([len(own) for own in captions])),
            index=torch.tensor(rows),
            group=torch.tensor(groups),
        )

    def _sample(self, row: int, epoch: int) -> tuple[Tensor, list[str], int]:
        """uint8 [3, S, S], the captions drawn for this epoch, and the group of one sample."""
        dataset = self.dataset
        number = int(np.searchsorted(self.first, row, side="right")) - 1
        path = dataset.folder / dataset.shards[number].file
        name = f"{path}, sample {row - self.first[number] + 1}"
        entry = _table(dataset.folder / SAMPLES, dataset.samples_sha256)[row]
        picture_at, picture_bytes, text_at, text_bytes, is_json, crc32, group = entry.item()
        try:
            file = _opened(path)
            picture = os.pread(file.number, picture_bytes, picture_at)
            text = os.pread(file.number, text_bytes, text_at)
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from None
        if zlib.crc32(text, zlib.crc32(picture)) != crc32:
            raise UserError(f"{name}: differs from its checksum in the index; the shard is damaged, fetch it again")
        own = texts_of(text, is_json, dataset.captions, where=name)
        # Keyed by the sample, so that nobody has to know the captions of another process's images.
        drawn = np.random.default_rng([self.seed, 2, epoch, row]).permutation(len(own))[: self.captions_per_image]
        pixels = self.transform(decode_image(picture, name=name))
        return pixels, [own[i] for i in drawn], group


class _Shares(Dataset[Batch | UserError]):
    """Step to this process's share of its batch."""

    def __init__(self, batches: ShardBatches, own: slice) -> None:
        self.batches = batches
        self.own = own

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return self.batches.read(step, self.own)
        except UserError as error:
            return error


def _as_it_is(batch: Batch | UserError) -> Batch | UserError:
    return batch


_table = lru_cache(maxsize=4)(read_samples)


class _OpenFile:
    """Closed with the last reference: the one that `_opened` keeps, or that of a read under way."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_opened = lru_cache(maxsize=OPEN_FILES)(_OpenFile)
