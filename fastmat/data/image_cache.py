"""Decoded images of one set at one resolution on disk, as the 8-bit pixels that a decoder would hand over.

    FOLDER/<key>/images.u8        uint8 [N, 3, S, S], mapped into memory by every reader
    FOLDER/<key>/manifest.json    what it was made from, and a checksum for every image

The key is a hash of the rows of the set, the sizes and times of its files, and the image transform: another picture
under an old name, or another rule, is another key. The first process that needs a cache decodes it into a folder of
its own and renames that; of several, the first to finish wins and the others use its folder. A kill leaves a folder
with a leading dot, which nobody reads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError
from fastmat.types import ImageTransform

FORMAT = 1
PIXELS, MANIFEST = "images.u8", "manifest.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImageCache:
    """`cache(row)` -> uint8 [3, S, S], a view of the file. Travels to workers as a path; all map the same pages.

    Raises UserError when the pixels of a row are not those that were written.
    """

    folder: Path
    size: int
    checksums: tuple[int, ...]

    def __call__(self, row: int) -> Tensor:
        pixels = _mapped(self.folder / PIXELS, (len(self.checksums), 3, self.size, self.size))[row]
        if zlib.crc32(pixels) != self.checksums[row]:
            raise _damaged(self.folder)
        return torch.from_numpy(pixels)


def open_image_cache(
    folder: Path, dataset: RetrievalSet, transform: ImageTransform, decode: Callable[[], Iterable[Tensor]]
) -> ImageCache:
    """The cache of `dataset` at `transform` below `folder`, made first where it is missing.

    decode: every image of the set in order, in uint8 [B, 3, S, S]; its errors leave nothing behind.
    Raises UserError for a folder that cannot be used and for a damaged cache.
    """
    made_of = describe(dataset, transform)
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
    place = folder / key
    try:
        if not place.exists():
            log.info("image cache: %d images of %s/%s to %s", dataset.n_images, dataset.name, dataset.split, place)
            _write(place, made_of, decode)
        manifest = json.loads((place / MANIFEST).read_bytes())
        checksums = tuple(map(int, manifest["checksums"]))
        length = (place / PIXELS).stat().st_size
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise _damaged(place) from None
    except OSError as error:
        raise UserError(f"image_cache {folder} cannot be used ({error.strerror}): give another folder") from error
    whole = len(checksums) == dataset.n_images and length == dataset.n_images * 3 * transform.size**2
    if not whole or manifest.get("made_of") != made_of:
        raise _damaged(place)
    return ImageCache(folder=place, size=transform.size, checksums=checksums)


def describe(dataset: RetrievalSet, transform: ImageTransform) -> dict[str, Any]:
    """All that the pixels depend on, as JSON has it. Captions are not among it."""
    paths = getattr(dataset.load, "paths", None)
    if paths is None:  # drawn, not read
        source: object = hashlib.sha256(pickle.dumps(dataset.load)).hexdigest()
    else:
        # The pictures are a hash here: 113,000 names would be most of the manifest.
        files = [[os.path.abspath(path), *_size_and_time(path)] for path in paths[: dataset.n_images]]
        source = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return {
        "format": FORMAT,
        "images": dataset.n_images,
        "source": source,
        "transform": asdict(transform),
        "pillow": PIL.__version__,  # decoders and resizing may change by a level
    }


def _write(place: Path, made_of: dict[str, Any], decode: Callable[[], Iterable[Tensor]]) -> None:
    """The whole folder or nothing, whoever else writes it too."""
    place.parent.mkdir(parents=True, exist_ok=True)
    own = place.parent / f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}"
    own.mkdir()
    try:
        checksums = []
        with (own / PIXELS).open("wb") as file:
            for images in decode():
                for pixels in images.numpy():
                    file.write(pixels)
                    checksums.append(zlib.crc32(pixels))
            os.fsync(file.fileno())  # the rename must not survive a crash that the pixels do not
        (own / MANIFEST).write_text(json.dumps({"made_of": made_of, "checksums": checksums}))
        try:
            own.rename(place)
        except OSError:
            if not place.exists():
                raise  # else another process was first
    finally:
        shutil.rmtree(own, ignore_errors=True)


@lru_cache(maxsize=16)
def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    # "c": writable for whoever gets a tensor of it, without reaching the file.
    return np.memmap(path, dtype=np.uint8, mode="c", shape=shape)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return -1, -1  # decoding it says what is wrong, and where it is named
    return stat.st_size, stat.st_mtime_ns


def _damaged(place: Path) -> UserError:
    return UserError(f"image cache {place} is damaged: delete this folder, it is made again")
