"""Augmented sets: what a generator makes of a set, written in the project's JSON format with provenance per row.

The folder holds `augmented.json`, whose images are relative to the folder, and `images/` where images were made. It is
read like any other set, and an augmented set can be augmented again: only what humans made is augmented.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from PIL import Image

from fastmat.data.provenance import HUMAN, Made, Provenance
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError

ANNOTATIONS = "augmented.json"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One caption or one image to be made, out of `caption` or of the picture that `load` returns.

    image_id: of the human image. caption: a human's; of a generator per image, the first one. copy: number among the
    requests for the same source. seed: a function of the run's seed, the source and `copy`, for every draw.
    """

    image_id: str
    caption: str
    load: Callable[[], Image.Image]
    copy: int
    seed: int


Result = str | Image.Image | None


@runtime_checkable
class Generator(Protocol):
    """Makes captions or images.

    name: as tables call it. model: name and hash of what is behind it. per: whether it is asked once for every caption
    or once for every image. copies: how often; None: as the run says.
    """

    name: str
    model: str
    per: Literal["caption", "image"]
    copies: int | None

    def __call__(self, requests: Sequence[Request]) -> Sequence[Result]:
        """For every request a caption, an RGB picture, or None where nothing could be made."""
        ...


@dataclass(frozen=True, kw_only=True)
class Written:
    """What `write_augmented_set` has made. dropped: results that were nothing, or a caption the image already had."""

    annotations: Path
    captions: int
    images: int
    dropped: int


def requests_of(
    dataset: RetrievalSet, generator: Generator, *, copies: int, seed: int
) -> Iterator[tuple[int, Request]]:
    """What to ask a generator, with the row of the image; generated captions and images are passed over."""
    for row, (image_id, captions) in enumerate(zip(dataset.ids, dataset.captions, strict=True)):
        makers = makers_of(dataset, row)
        human = [caption for caption, maker in zip(captions, makers, strict=True) if maker is None]
        for caption in human[: 1 if generator.per == "image" else None]:
            source = "" if generator.per == "image" else caption
            for copy in range(copies):
                own = seed_of(seed, image_id, source, copy)
                load = partial(dataset.load, row)
                yield row, Request(image_id=image_id, caption=caption, load=load, copy=copy, seed=own)


def seed_of(*parts: object) -> int:
    """63 bits that depend on all of `parts` and on nothing else."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "big") >> 1


def write_augmented_set(
    dataset: RetrievalSet,
    generator: Generator,
    out: Path,
    *,
    copies: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    tell: Callable[[int], object] = lambda done: None,
) -> Written:
    """All rows of `dataset`, then what `generator` makes of it, in the new folder `out`, which appears complete or not.

    copies: results asked for per source. batch_size: requests at a time. tell: called with every number of requests
    that is done. Raises UserError when `out` holds something, nothing was made, or the generator answers with what is
    no caption and no picture.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; name a new folder for the augmented set, or remove it")
    folder = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    try:
        writer = _Rows(dataset, generator, seed, folder, image_paths(dataset, out, folder))
        asked = requests_of(dataset, generator, copies=generator.copies or copies, seed=seed)
        while chunk := list(islice(asked, batch_size)):
            results = checked(generator, generator([request for _, request in chunk]), len(chunk))
            for (row, request), result in zip(chunk, results, strict=True):
                writer.add(row, request, result)
            tell(len(chunk))
        made = writer.made
        if not made["caption"] + made["image"]:
            raise UserError(
                f"{generator.name} made nothing new of {dataset.name}/{dataset.split}; look at its settings"
            )
        if not any((folder / "images").iterdir()):
            (folder / "images").rmdir()
        with open(folder / ANNOTATIONS, "w", encoding="utf-8") as file:
            file.write("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in writer.rows) + "\n]\n")
            file.flush()
            os.fsync(file.fileno())
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Written(annotations=out / ANNOTATIONS, captions=made["caption"], images=made["image"], dropped=made[""])


def image_paths(dataset: RetrievalSet, out: Path, folder: Path) -> list[str]:
    """Of every image, relative to `out`. Pictures that are in no file of their own are saved as PNG in `folder`."""
    files = getattr(dataset.load, "paths", None)
    if files is not None:
        return [os.path.relpath(Path(file).resolve(), out.resolve()) for file in files[: dataset.n_images]]
    names = [f"images/{row:08d}.png" for row in range(dataset.n_images)]
    for row, name in enumerate(names):
        dataset.load(row).save(folder / name)
    return names


class _Rows:
    """The rows of an augmented set in the making, and how many captions, images and ("") nothings were made."""

    def __init__(
        self, dataset: RetrievalSet, generator: Generator, seed: int, folder: Path, images: Sequence[str]
    ) -> None:
        self.generator = generator
        self.seed = seed
        self.folder = folder
        self.common = [
            {"image": image, "image_id": image_id, "group": f"group {group}"}
            for image, image_id, group in zip(images, dataset.ids, dataset.group, strict=True)
        ]
        self.known = [set(captions) for captions in dataset.captions]
        self.made = Counter[str]()
        self.rows: list[dict[str, Any]] = []
        for row, captions in enumerate(dataset.captions):
            for caption, maker in zip(captions, makers_of(dataset, row), strict=True):
                said = {"generator": HUMAN} if maker is None else maker.row()
                self.rows.append({**self.common[row], "caption": caption, **said})

    def add(self, row: int, request: Request, result: Result) -> None:
        if isinstance(result, str):
            caption = " ".join(result.split())
            if not caption or caption in self.known[row]:
                self.made[""] += 1
                return
            self.known[row].add(caption)
            source = request.image_id if self.generator.per == "image" else request.caption
            self._append({**self.common[row], "caption": caption}, self._provenance(source, "caption"))
        elif result is None:
            self.made[""] += 1
        else:
            label = f"{request.image_id} {self.generator.name} {request.seed:016x}"
            image = f"images/{hashlib.sha256(label.encode()).hexdigest()[:24]}.png"
            result.convert("RGB").save(self.folder / image)
            own = {"image": image, "image_id": label, "group": self.common[row]["group"], "caption": request.caption}
            self._append(own, self._provenance(request.caption, "image"))

    def _provenance(self, source: str, made: Made) -> Provenance:
        name, model = self.generator.name, self.generator.model
        return Provenance(generator=name, model=model, source=source, seed=self.seed, made=made)

    def _append(self, row: dict[str, Any], maker: Provenance) -> None:
        self.made[maker.made] += 1
        self.rows.append(row | maker.row())


def makers_of(dataset: RetrievalSet, row: int) -> Sequence[Provenance | None]:
    """Of an image's captions."""
    return dataset.provenance[row] if dataset.provenance else [None] * len(dataset.captions[row])


def checked(generator: Generator, results: object, count: int) -> Sequence[Result]:
    """What a generator answered. Raises UserError unless it is `count` captions, pictures or None."""
    if not isinstance(results, Sequence) or isinstance(results, str) or len(results) != count:
        said = f"{len(results)} results" if isinstance(results, Sequence) else type(results).__name__
        raise UserError(f"{generator.name} answered {count} requests with {said}; return a list, one entry per request")
    for result in results:
        if not isinstance(result, str | Image.Image | None):
            raise UserError(
                f"{generator.name} returned a {type(result).__name__}; return a caption, a PIL image or None"
            )
    return results
