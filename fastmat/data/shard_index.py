"""The index of a folder of WebDataset shards: which bytes of which tar file are which sample.

    FOLDER/*.tar          samples: neighbouring members of one key, `KEY.jpg` (or another picture) and `KEY.json` or
                          `KEY.txt`, whoever wrote them
    FOLDER/index.json     `ShardIndex`: number of samples, size and sha256 of every shard
    FOLDER/samples.npy    `SAMPLE` [N]: where each sample's picture and captions lie, their checksum, their group

Keys and extensions are the `webdataset` library's: a key ends at the first dot of the file name. A `.json` member
holds `captions` or `caption`, one string or a list, and may hold `group` as the JSON sets do; a `.txt` member holds a
caption a line. Of both, the `.json` counts when it has captions. Other members are left alone.

The shards are strangers' files: nothing is unpickled or unpacked, and links, devices and names that lead out of the
folder are refused. Everything is read once while the index is made, so that a mistake is met now, not in training.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastmat.data.captions import CaptionRule
from fastmat.data.retrieval import captions_of, label_of
from fastmat.errors import UserError

INDEX, SAMPLES = "index.json", "samples.npy"
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2")
SAMPLE = np.dtype(
    [
        ("picture", "<i8"),
        ("picture_bytes", "<i8"),
        ("text", "<i8"),
        ("text_bytes", "<i8"),
        ("json", "?"),
        ("crc32", "<u4"),  # of the picture's bytes and then the text's
        ("group", "<i8"),
    ]
)


class Shard(BaseModel):
    """One tar file; `bytes` and `sha256` are of the whole of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str = Field(pattern=r"^[^/\\]+\.tar$")
    samples: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str


class ShardIndex(BaseModel):
    """The shards of a folder in the order of their names, and the sha256 of `samples.npy`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["fastmat shards 1"] = "fastmat shards 1"
    samples: int = Field(gt=0)
    samples_sha256: str
    shards: tuple[Shard, ...]


def index_shards(folder: Path) -> ShardIndex:
    """Read every tar file of `folder` and write its index, over one that is there.

    Raises UserError naming the shard and the sample: damaged, compressed, without picture or captions, unsafe.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of shards")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        packed = next(iter(sorted(folder.glob("*.tar.*")) + sorted(folder.glob("*.tgz"))), None)
        hint = f"{packed.name} is compressed, unpack it to .tar" if packed else "shards are named *.tar"
        raise UserError(f"there is no shard in {folder}: {hint}")
    groups: dict[str, int] = {}
    numbers = itertools.count()
    parts, shards = [], []
    for path in paths:
        rows = np.array([*_rows(path, groups, numbers)], dtype=SAMPLE)
        parts.append(rows)
        shards.append(Shard(file=path.name, samples=len(rows), bytes=path.stat().st_size, sha256=file_sha256(path)))
    samples = np.concatenate(parts)
    if not len(samples):
        raise UserError(f"there is no sample in the {len(paths)} shards of {folder}")
    # The index names the table by its hash, so that an index and a table of two runs never pass for a pair.
    write_whole(folder / SAMPLES, lambda file: np.save(file, samples, allow_pickle=False))
    index = ShardIndex(samples=len(samples), samples_sha256=file_sha256(folder / SAMPLES), shards=tuple(shards))
    write_whole(folder / INDEX, lambda file: file.write(index.model_dump_json(indent=1).encode()))
    return index


def read_index(file: Path) -> ShardIndex:
    """The index at `file`, whose shards all stand beside it in the size they had.

    Raises UserError where one does not, or the index is missing or damaged.
    """
    folder, again = file.parent, f"`fastmat pack --index {file.parent}` makes it of the shards there"
    if not file.is_file():
        raise UserError(f"{file}: there is no such index; {again}")
    try:
        index = ShardIndex.model_validate_json(file.read_bytes())
        whole = (
            sum(shard.samples for shard in index.shards) == index.samples
            and file_sha256(folder / SAMPLES) == index.samples_sha256
            and read_samples(folder / SAMPLES, index.samples_sha256).shape == (index.samples,)
        )
    except (ValidationError, FileNotFoundError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{file}: the index or its {SAMPLES} is damaged; {again}")
    for shard in index.shards:
        path = folder / shard.file
        if not path.is_file():
            raise UserError(f"{path}: this shard is in the index, but missing; fetch it again")
        if path.stat().st_size != shard.bytes:
            raise UserError(f"{path}: {path.stat().st_size} bytes, but {shard.bytes} in the index; fetch it again")
    return index


def check_shards(folder: Path) -> ShardIndex:
    """The index of `folder`, after every shard's sha256 was compared. Raises UserError naming one that differs."""
    index = read_index(folder / INDEX)
    for shard in index.shards:
        if file_sha256(folder / shard.file) != shard.sha256:
            raise UserError(f"{folder / shard.file}: its sha256 is not the one in the index; fetch the shard again")
    return index


def read_samples(path: Path, sha256: str) -> np.ndarray:
    """`SAMPLE` [N], mapped into memory; sha256: that of the file, which tells two of the same name apart."""
    # A plain array over the mapped pages: rows of a memmap are slow to take.
    table = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    if table.dtype != SAMPLE:
        raise ValueError(f"{path} is not a table of samples")
    return table


def texts_of(data: bytes, is_json: bool, rule: CaptionRule, *, where: str) -> list[str]:
    """The captions in a text member. Raises UserError, which begins with `where`, when there is none."""
    return captions_of(_row(data, is_json, where), rule, where)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a file of another name, flush it to the disk and rename; a reader sees all or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.filename is None:  # writing says what went wrong, not where
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def _rows(path: Path, groups: dict[str, int], numbers: Iterator[int]) -> Iterator[tuple[Any, ...]]:
    """A row of `SAMPLE` for each sample. groups: numbers of the groups met so far; numbers: those still free."""
    with path.open("rb") as file:
        for key, members in itertools.groupby(_members(path), key=lambda member: member[0]):
            where = f"{path}, sample '{key}'"
            by_extension: dict[str, tarfile.TarInfo] = {}
            for _, extension, info in members:
                if extension in by_extension:
                    raise UserError(f"{where}: there are two members .{extension}; give every sample its own key")
                by_extension[extension] = info
            pictures = [info for extension, info in by_extension.items() if extension in PICTURES]
            if len(pictures) != 1:
                found = ", ".join(f".{extension}" for extension in by_extension)
                raise UserError(f"{where}: expected one picture (.{', .'.join(PICTURES)}), got {found}")
            picture = _read(file, pictures[0])
            for extension in ("json", "txt"):
                if extension not in by_extension:
                    continue
                info, is_json = by_extension[extension], extension == "json"
                text = _read(file, info)
                row = _row(text, is_json, where)
                if "caption" in row or "txt" not in by_extension:
                    break
            else:
                raise UserError(f"{where}: there is no caption; expected a .json or a .txt beside the picture")
            captions_of(row, "none", where)  # complains now of what training could not use
            label = label_of(row, "group", where)
            group = next(numbers) if label not in groups else groups[label]
            if label is not None:
                groups[label] = group
            yield (
                pictures[0].offset_data,
                pictures[0].size,
                info.offset_data,
                info.size,
                is_json,
                zlib.crc32(text, zlib.crc32(picture)),
                group,
            )


def _read(file: BinaryIO, info: tarfile.TarInfo) -> bytes:
    file.seek(info.offset_data)
    return file.read(info.size)


def _row(data: bytes, is_json: bool, where: str) -> dict[str, Any]:
    """What a text member says, in the keys of a JSON set."""
    try:
        text = data.decode("utf-8-sig")
        if not is_json:
            return {"caption": [line.strip() for line in text.splitlines() if line.strip()]}
        row = json.loads(text)
    except UnicodeDecodeError:
        raise UserError(f"{where}: its text is not UTF-8") from None
    except (ValueError, RecursionError):
        raise UserError(f"{where}: its .json is not JSON") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: its .json holds a {type(row).__name__}, not an object")
    return {**row, "caption": row["captions"]} if "captions" in row else row


def _members(path: Path) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, extension, member) of the files in a tar, in order."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps all it has seen
                _refuse_unsafe(path, info)
                found = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", info.name)
                if info.isreg() and found:
                    yield found[1], found[2].lower(), info
            end = tar.offset
        # tarfile takes a header that it cannot read for the end of the archive.
        with path.open("rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise UserError(f"{path}: damaged after byte {end}; fetch the shard again")
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not a whole uncompressed tar file ({error}); fetch the shard again") from None


def _refuse_unsafe(path: Path, info: tarfile.TarInfo) -> None:
    if info.name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", info.name):
        raise UserError(f"{path}: the name '{info.name}' leads out of the folder; this shard is not to be trusted")
    if not (info.isreg() or info.isdir()) or info.issparse():
        raise UserError(f"{path}: '{info.name}' is no plain file; this shard is not to be trusted")
