"""A retrieval set as WebDataset shards: `shard-000000.tar` and so on, then their index.

A sample is `ROW.jpg`, or another picture, and `ROW.json` with `captions`, `image_id`, `group` and, of what was
generated, `provenance`. A picture that is not made smaller keeps the bytes of its file. A shard is written under
another name and renamed when it is whole, and equal input gives equal bytes, so that packing goes on after a kill
with the first shard that is not there. `packing.json` says what is packed; index.json comes last.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from fastmat.data.images import FORMATS
from fastmat.data.retrieval import RetrievalSet
from fastmat.data.shard_index import ShardIndex, index_shards, write_whole
from fastmat.errors import UserError

PACKING = "packing.json"
EXTENSIONS = {"PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm", "JPEG2000": "jp2"}


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What is to be packed, and where to.

    images_per_shard: in every shard but the last. resize: pixels that the shorter side of a larger picture is shrunk
    to, as JPEG of `quality`; None: every picture as it is.
    """

    dataset: RetrievalSet
    folder: Path
    images_per_shard: int
    resize: int | None = None
    quality: int = 95

    def __post_init__(self) -> None:
        if self.images_per_shard < 1:
            raise UserError(f"images_per_shard must be at least 1, got {self.images_per_shard}")
        if self.resize is not None and self.resize < 1:
            raise UserError(f"resize must be at least 1 pixel, got {self.resize}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality must be in 1..100, got {self.quality}")

    @property
    def shards(self) -> list[Path]:
        """Their files."""
        count = -(-self.dataset.n_images // self.images_per_shard)
        return [self.folder / f"shard-{number:06d}.tar" for number in range(count)]

    def told(self) -> dict[str, Any]:
        """What a resumed packing must share, as JSON has it."""
        return {
            "dataset": self.dataset.name,
            "split": self.dataset.split,
            "fingerprint": self.dataset.fingerprint(),
            "images_per_shard": self.images_per_shard,
            "resize": self.resize,
            "quality": self.quality,
            "shards": [path.name for path in self.shards],
        }


def pack(packing: Packing, *, workers: int = 0, done: Callable[[int], object] = lambda images: None) -> ShardIndex:
    """Write the shards that `packing.folder` lacks, then the index. `done(images)` is called after every shard.

    workers: processes that write shards, 0: this one does.
    Raises UserError for a folder where something else was packed and for a picture that cannot be decoded; the shards
    that were finished stay.
    """
    told = json.loads(json.dumps(packing.told()))
    note = packing.folder / PACKING
    if note.is_file() and _read_note(note) != told:
        raise UserError(f"{packing.folder}: another set was packed there, or otherwise; name a new folder")
    packing.folder.mkdir(parents=True, exist_ok=True)
    write_whole(note, lambda file: file.write(json.dumps(told, indent=1).encode()))
    missing = [number for number, path in enumerate(packing.shards) if not path.is_file()]
    done(packing.dataset.n_images - sum(len(_rows(packing, number)) for number in missing))
    for images in _written(packing, missing, workers):
        done(images)
    return index_shards(packing.folder)


def index_folder(folder: Path) -> ShardIndex:
    """Make the index of the shards in `folder` again, or of shards that others wrote.

    Raises UserError in a folder whose packing is not finished.
    """
    note = folder / PACKING
    if note.is_file():
        shards = _read_note(note)["shards"]
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(shards)} shards are missing, {missing[0]} first; "
                f"repeat the command that packed them with --resume"
            )
    return index_shards(folder)


def _read_note(note: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(note.read_bytes())
        assert isinstance(told["shards"], list)
    except (ValueError, TypeError, KeyError, AssertionError):
        raise UserError(f"{note} is damaged; remove {note.parent} and pack again") from None
    return told


def _written(packing: Packing, numbers: list[int], workers: int) -> Iterator[int]:
    """Write the shards; yields the number of images of each."""
    if workers == 0:
        yield from (_write_shard(packing, number) for number in numbers)
        return
    with ProcessPoolExecutor(workers, initializer=_keep, initargs=(packing,)) as pool:
        try:
            yield from pool.map(_write_kept, numbers)
        finally:
            pool.shutdown(cancel_futures=True)


_kept: list[Packing] = []


def _keep(packing: Packing) -> None:
    """In a worker: the set travels there once, not with every shard."""
    _kept[:] = [packing]


def _write_kept(number: int) -> int:
    return _write_shard(_kept[0], number)


def _rows(packing: Packing, number: int) -> range:
    start = number * packing.images_per_shard
    return range(start, min(start + packing.images_per_shard, packing.dataset.n_images))


def _write_shard(packing: Packing, number: int) -> int:
    rows = _rows(packing, number)

    def write(file: BinaryIO) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row in rows:
                extension, data = _picture(packing, row)
                _add(tar, f"{row:09d}.{extension}", data)
                _add(tar, f"{row:09d}.json", json.dumps(_text(packing.dataset, row), ensure_ascii=False).encode())

    write_whole(packing.shards[number], write)
    return len(rows)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _picture(packing: Packing, row: int) -> tuple[str, bytes]:
    """Extension and bytes. Decoded in any case: a damaged picture is met now, and not in training."""
    image = packing.dataset.load(row)
    paths = getattr(packing.dataset.load, "paths", None)
    short = min(image.size)
    buffer = io.BytesIO()
    if packing.resize is not None and short > packing.resize:
        width, height = (max(1, round(side * packing.resize / short)) for side in image.size)
        image.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=packing.quality)
        return "jpg", buffer.getvalue()
    if paths is None:  # drawn, not read
        image.save(buffer, "PNG")
        return "png", buffer.getvalue()
    data: bytes = paths[row].read_bytes()
    with Image.open(io.BytesIO(data), formats=FORMATS) as header:
        return EXTENSIONS.get(header.format or "", "jpg"), data


def _text(dataset: RetrievalSet, row: int) -> dict[str, Any]:
    said = {"captions": dataset.captions[row], "image_id": dataset.ids[row], "group": dataset.group[row]}
    if dataset.provenance:
        said["provenance"] = [made and made.row() for made in dataset.provenance[row]]
    return said
