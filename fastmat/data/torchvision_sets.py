"""Labelled sets that lie on disk as torchvision lays them out, read by torchvision; nothing is ever downloaded.

Picture files are decoded by `fastmat.data.images`, as everywhere. CIFAR comes as pickles, which torchvision opens only
when their MD5 is that of the published files. Left out: ImageNet and Country211, which are folders of codes
(`image_folder` with `names`), sets without names for their classes (GTSRB), and PCAM, which needs h5py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmat.data.annotations import pictures
from fastmat.data.labelled import class_names, fill, in_turns
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError, nearest

Which = Literal[
    "caltech101",
    "cifar10",
    "cifar100",
    "dtd",
    "eurosat",
    "fgvc_aircraft",
    "flowers102",
    "food101",
    "oxford_pets",
    "stanford_cars",
    "stl10",
    "sun397",
    "svhn",
]


def torchvision_set(
    *,
    which: Which,
    root: Path,
    split: str = "test",
    names: Path | None = None,
    templates: tuple[str, ...] = ("This is a photo of a {}",),
) -> RetrievalSet:
    """A set for classification, as torchvision has it below `root`; its caption of an image is the prompt of its class.

    split: one of torchvision's; "all" for sets that it does not split (caltech101, eurosat, sun397).
    names: a JSON object, torchvision's class to the words for it; None: its own names, underscores as blanks.
    templates: as in `image_folder`. The images of the classes take turns, so that the first N hold as many classes as
        N allows.
    Raises UserError for another set or split, and naming `root` where the set is missing, incomplete or damaged.
    """
    if which not in get_args(Which):
        raise UserError(f"torchvision's set {which!r} is not known here{nearest(which, get_args(Which))}")
    kind, root = KINDS[which], Path(root)
    if split not in kind.splits:
        raise UserError(f"{which} has no split {split!r}: choose one of {', '.join(kind.splits)}")
    found = read(kind, root, kind.splits[split])
    prompts = fill(templates, class_names(names, found.classes))
    order = in_turns(found.labels)
    return RetrievalSet(
        name=which,
        split=split,
        captions=tuple(prompts[found.labels[row]] for row in order),
        ids=tuple(found.ids[row] for row in order),
        group=tuple(found.labels[row] for row in order),
        load=_InOrder(tuple(order), found.load),
    )


class Found(NamedTuple):
    """N pictures: classes by label, labels [N], ids [N], and row to picture."""

    classes: Sequence[str]
    labels: Sequence[int]
    ids: Sequence[str]
    load: Callable[[int], Image.Image]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """reader: torchvision's class. place: what must lie below the root. splits: to the arguments of the reader.

    find: from what the reader gives to classes, labels and pictures. to_paths: the reader takes a `loader` of pictures.
    """

    reader: str
    place: str
    splits: Mapping[str, Mapping[str, Any]]
    find: Callable[[Any, Path], Found]
    to_paths: bool = field(default=False)


def read(kind: Kind, root: Path, arguments: Mapping[str, Any]) -> Found:
    from torchvision import datasets

    # Before the reader runs: one of them makes the folder that it misses.
    if not (root / kind.place).exists():
        raise UserError(
            f"{root}: there is no '{kind.place}' in it, where torchvision's {kind.reader} keeps its files; fetch the "
            "set with torchvision first, here nothing is downloaded"
        )
    loader = {"loader": str} if kind.to_paths else {}
    try:
        return kind.find(getattr(datasets, kind.reader)(str(root), **arguments, **loader), root)
    except UserError:
        raise
    except Exception as error:  # readers raise nearly anything on files that are damaged or not there
        reason = str(error).split("You can use")[0].strip().rstrip(".") or type(error).__name__
        raise UserError(
            f"{root}: torchvision's {kind.reader} cannot read its files there ({reason}); fetch the set again"
        ) from None


def arrays(dataset: Any, root: Path, *, labels: str = "labels", classes: Sequence[str] | None = None) -> Found:
    """Pictures in memory, [N, 3, H, W] or [N, H, W, 3]."""
    pixels = dataset.data if dataset.data.shape[-1] == 3 else dataset.data.transpose(0, 2, 3, 1)
    return Found(
        classes=dataset.classes if classes is None else classes,
        labels=[int(label) for label in getattr(dataset, labels)],
        ids=[f"{i:05d}" for i in range(len(pixels))],
        load=_Arrays(pixels),
    )


def files(root: Path, classes: Sequence[str], rows: Sequence[tuple[Path, int]]) -> Found:
    """Pictures by their paths, in the order of these: a reader may list them as the disk does."""
    rows = sorted(rows)
    paths = [path for path, _ in rows]
    return Found(
        classes=classes,
        labels=[int(label) for _, label in rows],
        ids=[path.relative_to(root).as_posix() for path in paths],
        load=pictures(paths, [str(root)] * len(paths)),
    )


def loaded(dataset: Any, root: Path) -> Found:
    """Of a reader whose loader gives back the path."""
    return files(
        root, dataset.classes, [(Path(path), label) for path, label in map(dataset.__getitem__, _all(dataset))]
    )


def eurosat(dataset: Any, root: Path) -> Found:
    """`AnnualCrop` is two words."""
    found = loaded(dataset, root)
    return found._replace(classes=[re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name) for name in found.classes])


def sun397(dataset: Any, root: Path) -> Found:
    """`apartment_building/outdoor` is one class of two."""
    found = loaded(dataset, root)
    return found._replace(classes=[name.replace("/", " ") for name in found.classes])


def oxford_pets(dataset: Any, root: Path) -> Found:
    return files(root, dataset.classes, list(zip(dataset._images, dataset._labels, strict=True)))


def caltech101(dataset: Any, root: Path) -> Found:
    folder = Path(dataset.root) / "101_ObjectCategories"
    rows = [
        (folder / dataset.categories[label] / f"image_{number:04d}.jpg", label)
        for label, number in zip(dataset.y, dataset.index, strict=True)
    ]
    return files(root, dataset.categories, rows)


def cifar(dataset: Any, root: Path) -> Found:
    return arrays(dataset, root, labels="targets")


def svhn(dataset: Any, root: Path) -> Found:
    return arrays(dataset, root, classes=[str(digit) for digit in range(10)])


def named(*splits: str) -> Mapping[str, Mapping[str, Any]]:
    return {split: {"split": split} for split in splits}


def _all(dataset: Any) -> range:
    return range(len(dataset))


CIFAR_SPLITS: Mapping[str, Mapping[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
WHOLE: Mapping[str, Mapping[str, Any]] = {"all": {}}
KINDS: Mapping[str, Kind] = {
    "caltech101": Kind(reader="Caltech101", place="caltech101", splits=WHOLE, find=caltech101),
    "cifar10": Kind(reader="CIFAR10", place="cifar-10-batches-py", splits=CIFAR_SPLITS, find=cifar),
    "cifar100": Kind(reader="CIFAR100", place="cifar-100-python", splits=CIFAR_SPLITS, find=cifar),
    "dtd": Kind(reader="DTD", place="dtd", splits=named("train", "val", "test"), find=loaded, to_paths=True),
    "eurosat": Kind(reader="EuroSAT", place="eurosat", splits=WHOLE, find=eurosat, to_paths=True),
    "fgvc_aircraft": Kind(
        reader="FGVCAircraft",
        place="fgvc-aircraft-2013b",
        splits=named("train", "val", "trainval", "test"),
        find=loaded,
        to_paths=True,
    ),
    "flowers102": Kind(
        reader="Flowers102", place="flowers-102", splits=named("train", "val", "test"), find=loaded, to_paths=True
    ),
    "food101": Kind(reader="Food101", place="food-101", splits=named("train", "test"), find=loaded, to_paths=True),
    "oxford_pets": Kind(
        reader="OxfordIIITPet", place="oxford-iiit-pet", splits=named("trainval", "test"), find=oxford_pets
    ),
    "stanford_cars": Kind(
        reader="StanfordCars", place="stanford_cars", splits=named("train", "test"), find=loaded, to_paths=True
    ),
    "stl10": Kind(reader="STL10", place="stl10_binary", splits=named("train", "test"), find=arrays),
    "sun397": Kind(reader="SUN397", place="SUN397", splits=WHOLE, find=sun397, to_paths=True),
    "svhn": Kind(reader="SVHN", place=".", splits=named("train", "test", "extra"), find=svhn),
}


@dataclass(frozen=True, eq=False)
class _Arrays:
    """Row to picture, from memory: uint8 [N, H, W, 3]."""

    pixels: NDArray[np.uint8]

    def __call__(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels[index]))


@dataclass(frozen=True)
class _InOrder:
    """Row to picture, the rows of `load` in another order."""

    order: tuple[int, ...]
    load: Callable[[int], Image.Image]

    def __call__(self, index: int) -> Image.Image:
        return self.load(self.order[index])
