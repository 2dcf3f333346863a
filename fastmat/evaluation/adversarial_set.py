"""Adversarial images and captions on disk: written shard by shard, resumable, checked when read.

    DIR/manifest.json           `Manifest`: what was attacked with what, and one entry per finished shard
    DIR/images-00000.safetensors  images [n, 3, H, W] fp32, index [n], group [n] int64, distance [n] fp32
    DIR/texts.jsonl             one caption a line: {"image": id, "index": position of the image in its set,
                                "caption": 0, 1, ... of that image, "source", "adversarial", "words_changed"}

The manifest is the truth. A shard file is renamed into place and the captions are flushed to the disk before the
manifest names them, so a run killed anywhere leaves complete shards and, at most, caption lines behind the last named
byte, which the next run cuts off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastmat.attacks.base import BUDGET_SLACK
from fastmat.errors import UserError
from fastmat.evaluation.evaluate import Attacked
from fastmat.evaluation.manifest import Manifest, Shard, TextLine, sha256
from fastmat.evaluation.results import read_json, to_json, write_atomic
from fastmat.types import Batch

MANIFEST, TEXTS = "manifest.json", "texts.jsonl"


class AdversarialSetWriter:
    """Writes attacked batches in set order; a context manager, which also saves what is done on Ctrl-C.

        with AdversarialSetWriter(folder, plan=manifest, ids=dataset.ids) as writer:
            for attacked in run_attack(model, attack, writer.missing(batches), context):
                writer.add(attacked)

    plan: a manifest without shards. ids: names of the images, in set order. shard_images: a shard is closed by the
    batch that fills it.

    Raises UserError when the folder holds a finished set, something else, or a set begun with another model, other
    data or another configuration; a set begun with the same is taken up where it stopped.
    """

    def __init__(self, folder: Path, *, plan: Manifest, ids: Sequence[str], shard_images: int = 128) -> None:
        assert len(ids) == plan.n_images and not plan.shards
        self.folder = folder
        self.ids = ids
        self.shard_images = shard_images
        self.manifest = self._resumed(plan)
        self._pending: list[Attacked] = []

    @property
    def n_done(self) -> int:
        """Images in finished shards, where a resumed run goes on."""
        return self.manifest.n_done

    def missing(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, or parts of batches, that no finished shard holds yet."""
        skip, seen = self.n_done, 0
        for batch in batches:
            start, seen = seen, seen + len(batch)
            if start >= skip:
                yield batch
            elif seen > skip:
                yield batch.rows(skip - start, len(batch))

    def add(self, attacked: Attacked) -> None:
        """The next batch of the set; closes a shard when it is full."""
        done = self.n_done + sum(len(part.pairs) for part in self._pending)
        index = attacked.pairs.index.tolist()
        assert index == list(range(done, done + len(index))), f"expected images from {done} on, got {index}"
        self._pending.append(attacked)
        if done + len(index) - self.n_done >= self.shard_images:
            self.flush()

    def flush(self) -> None:
        """Finish a shard of what was added since the last one. File first, then captions, then the manifest."""
        if not self._pending:
            return
        tensors = {
            "images": torch.cat([part.pairs.images for part in self._pending]).contiguous(),
            "index": torch.cat([part.pairs.index for part in self._pending]),
            "group": torch.cat([part.pairs.group for part in self._pending]),
            "distance": torch.cat([part.distance for part in self._pending]),
        }
        content = save(tensors)
        lines = b"".join(self._lines(part) for part in self._pending)
        name = f"images-{len(self.manifest.shards):05d}.safetensors"
        write_atomic(self.folder / name, content)
        append_at(self.folder / TEXTS, self.manifest.text_bytes, lines)
        shard = Shard(
            file=name,
            sha256=sha256(content),
            rows=len(tensors["images"]),
            text_bytes=len(lines),
            text_sha256=sha256(lines),
            seconds=sum(part.seconds for part in self._pending),
        )
        self.manifest = self.manifest.model_copy(update={"shards": [*self.manifest.shards, shard]})
        write_atomic(self.folder / MANIFEST, to_json(self.manifest))
        self._pending = []

    def __enter__(self) -> AdversarialSetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self.flush()

    def _resumed(self, plan: Manifest) -> Manifest:
        folder = self.folder
        if not (folder / MANIFEST).exists():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(f"{folder} exists and is no adversarial set: choose another output folder")
            write_atomic(folder / MANIFEST, to_json(plan))
            return plan
        found = read_json(folder / MANIFEST, Manifest)
        if found.n_done >= found.n_images:
            raise UserError(f"{folder} holds a finished adversarial set: choose another output folder")
        for what in ("model", "data", "config_sha256", "n_images"):
            if getattr(found, what) != getattr(plan, what):
                what = {"config_sha256": "configuration", "n_images": "number of images"}.get(what, what)
                raise UserError(
                    f"{folder} holds {found.n_done} of {found.n_images} images made with another {what}: "
                    "repeat that run to finish it, or choose another output folder"
                )
        texts = folder / TEXTS
        if (texts.stat().st_size if texts.exists() else 0) < found.text_bytes:
            raise UserError(f"{texts} is shorter than {MANIFEST} says: choose another output folder and start again")
        return found

    def _lines(self, part: Attacked) -> bytes:
        pairs = part.pairs
        images = pairs.txt2img.tolist()
        lines = []
        for t, image in enumerate(images):
            index = int(pairs.index[image])
            line = TextLine(
                image=self.ids[index],
                index=index,
                caption=images[:t].count(image),
                source=part.sources[t],
                adversarial=pairs.texts[t],
                words_changed=int(part.words_changed[t]),
            )
            lines.append(json.dumps(line.model_dump(), ensure_ascii=False) + "\n")
        return "".join(lines).encode()


class AdversarialSet:
    """A finished set. Iterating yields one `Attacked` per shard, as often as wanted; hashes are checked each time.

    data: fingerprint of the clean set that the reader evaluates with, when it must be the one attacked.

    Raises UserError when the folder is no finished set, was made of other data, or holds anything but what the manifest
    says.
    """

    def __init__(self, folder: Path, *, data: str | None = None) -> None:
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder} is no adversarial set: it has no {MANIFEST}; `fastmat attack` makes one")
        self.manifest = read_json(folder / MANIFEST, Manifest)
        done, total = self.manifest.n_done, self.manifest.n_images
        if done != total:
            raise UserError(f"{folder} holds {done} of {total} images: repeat its `fastmat attack` run to finish it")
        if data is not None and data != self.manifest.data:
            raise UserError(
                f"{folder} was made of other data ({self.manifest.dataset}, {self.manifest.split}): "
                "evaluate it with the annotations it was made of"
            )
        missing = [name for name in [TEXTS, *(s.file for s in self.manifest.shards)] if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder / missing[0]} is missing: copy it from where the set was made, or make it again")

    def __len__(self) -> int:
        """Shards."""
        return len(self.manifest.shards)

    def __iter__(self) -> Iterator[Attacked]:
        first = 0
        with (self.folder / TEXTS).open("rb") as texts:
            for shard in self.manifest.shards:
                yield self._attacked(shard, texts.read(shard.text_bytes), first)
                first += shard.rows

    def check_budget(self, clean: Iterable[Batch]) -> None:
        """Measure every stored image against its clean one; `clean` in set order, at the surrogate's resolution.

        What has no budget is not measured. Raises UserError naming the first image outside the budget.
        """
        threat = self.manifest.threat
        if not threat.budgeted:
            return
        wanted = iter(image for batch in clean for image in batch.images)
        for attacked in self:
            for index, image in zip(attacked.pairs.index.tolist(), attacked.pairs.images, strict=True):
                source = next(wanted, None)
                if source is None or source.shape != image.shape:
                    came = "no clean image" if source is None else f"a clean one of {tuple(source.shape)}"
                    raise UserError(f"{self.folder}: image {index} is {tuple(image.shape)}, but there is {came}")
                delta = image - source.cpu()
                distance = float(delta.abs().max() if threat.norm == "linf" else delta.norm())
                if not distance <= threat.eps + BUDGET_SLACK * max(1.0, threat.eps):
                    raise UserError(
                        f"{self.folder}: image {index} is {distance:.6f} from its clean one, "
                        f"the budget is {threat.eps:.6f} ({threat.norm})"
                    )

    def _attacked(self, shard: Shard, lines: bytes, first: int) -> Attacked:
        path = self.folder / shard.file
        content = path.read_bytes()
        for name, found, expected in (
            (path, sha256(content), shard.sha256),
            (self.folder / TEXTS, sha256(lines), shard.text_sha256),
        ):
            if found != expected:
                raise UserError(f"{name} was changed or damaged after it was written (sha256 differs): make it again")
        try:
            tensors = load(content)
            images, index, group, distance = (tensors[name] for name in ("images", "index", "group", "distance"))
            texts = [TextLine.model_validate_json(line) for line in lines.splitlines()]
            check_shapes(images, index, group, distance, first, shard.rows)
            rows = torch.tensor([line.index for line in texts], dtype=torch.int64) - first
            if not bool(((rows >= 0) & (rows < shard.rows)).all()):
                raise ValueError("a caption belongs to no image of its shard")
        except (SafetensorError, KeyError, ValidationError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} and its captions do not fit the format of an adversarial set: {reason}") from None
        return Attacked(
            pairs=Batch(
                images=images, texts=tuple(line.adversarial for line in texts), txt2img=rows, index=index, group=group
            ),
            sources=tuple(line.source for line in texts),
            distance=distance,
            words_changed=torch.tensor([line.words_changed for line in texts], dtype=torch.int64),
            seconds=shard.seconds,
        )


def check_shapes(images: Tensor, index: Tensor, group: Tensor, distance: Tensor, first: int, rows: int) -> None:
    """Raise ValueError unless the tensors are a shard of `rows` images from position `first` on."""
    if images.dtype != torch.float32 or images.dim() != 4 or images.shape[:2] != (rows, 3):
        raise ValueError(f"images must be [{rows}, 3, H, W] fp32, got {tuple(images.shape)} {images.dtype}")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError("images must lie in [0, 1]")
    if not torch.equal(index, torch.arange(first, first + rows)):
        raise ValueError(f"index must count from {first} to {first + rows - 1}")
    if group.shape != (rows,) or distance.shape != (rows,):
        raise ValueError(f"group and distance must be [{rows}]")


def append_at(path: Path, offset: int, content: bytes) -> None:
    """Write `content` at `offset`, cut off anything behind it, and flush to the disk."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(offset)
        file.seek(offset)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
