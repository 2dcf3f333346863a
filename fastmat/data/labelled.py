"""Labelled sets: retrieval sets in which the caption of an image is the prompt of its class.

Images of one class form a group and share its prompts, so every defence, attack and evaluation reads a labelled set as
it reads any other; TR@1 is the accuracy. What contrasts with all classes at once asks `class_prompts` for them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from PIL import Image

from fastmat.data.digits import Split, digits_labels, digits_set
from fastmat.data.digits_text import Description
from fastmat.data.images import read_image
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError, nearest

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2"})
DigitsLabel = Literal["digit", "colour", "object"]


def image_folder(
    folder: Path,
    *,
    title: str,
    split: str,
    names: Path | None = None,
    templates: tuple[str, ...] = ("This is a photo of a {}",),
) -> RetrievalSet:
    """`folder/CLASS/**/PICTURE`: one class per folder, as ImageNet and its kin are laid out.

    title, split: as the tables shall name them.
    names: a JSON object, class folder to the words for it; None: the folder's name, underscores as blanks. Folders that
        it leaves out are refused.
    templates: prompts of a class, "{}" is its name (default: that of TeCoA, ICLR 2023); an image has them all as
        captions, and `class_prompts` averages over them.
    The images of the classes take turns, so that the first N hold as many classes as N allows.
    Raises UserError naming the folder or the file: missing, without classes, a class without pictures or name, two
    classes of one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of classes; name the one that holds a folder for each class")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(classes) < 2:
        raise UserError(f"{folder}: expected a folder for each of two classes or more, found {len(classes)}")
    prompts = fill(templates, class_names(names, classes))
    pictures = [_pictures(folder / name) for name in classes]
    labels = [c for c, paths in enumerate(pictures) for _ in paths]
    paths = [path for paths in pictures for path in paths]
    order = in_turns(labels)
    return RetrievalSet(
        name=title,
        split=split,
        captions=tuple(prompts[labels[row]] for row in order),
        ids=tuple(paths[row].relative_to(folder).as_posix() for row in order),
        group=tuple(labels[row] for row in order),
        load=_Files(tuple(paths[row] for row in order)),
    )


def labelled_digits(
    split: Split,
    *,
    label: DigitsLabel = "object",
    templates: tuple[str, ...] = ("a picture of a {}",),
    seed: int = 0,
) -> RetrievalSet:
    """The built-in set with labels in place of its captions: what its first object is, the left or upper one.

    label: "digit" (10 classes: "three"), "colour" (8: "red digit") or "object" (80: "red three").
    templates: as in `image_folder`; the small model knows the words of the built-in captions.
    Raises UserError for another label, and as `digits_set`.
    """
    if label not in get_args(DigitsLabel):
        raise UserError(f"the digits set has no label {label!r}{nearest(label, get_args(DigitsLabel))}")
    named = [_first_object(description, label) for description in digits_labels(split, seed=seed)]
    classes = sorted(set(named))
    prompts = fill(templates, classes)
    group = tuple(map(classes.index, named))
    scenes = digits_set(split, seed=seed)
    return replace(scenes, name=f"digits by {label}", captions=tuple(prompts[c] for c in group), group=group)


def class_prompts(dataset: RetrievalSet) -> tuple[tuple[str, ...], ...] | None:
    """The prompts of each class, classes in the order of their groups; None where captions are not labels.

    Captions are labels where images of one group have the same captions, no other group has one of these, and there
    are fewer groups than images.
    """
    by_group: dict[int, tuple[str, ...]] = {}
    if any(
        by_group.setdefault(group, captions) != captions
        for group, captions in zip(dataset.group, dataset.captions, strict=True)
    ):
        return None
    prompts = [text for captions in by_group.values() for text in captions]
    if len(by_group) == dataset.n_images or len(set(prompts)) < len(prompts):
        return None
    return tuple(by_group[group] for group in sorted(by_group))


def fill(templates: Sequence[str], names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """For each name all templates with the name in place of "{}". Raises UserError where that is not possible.

    >>> fill(["a {}", "the {}"], ["dog", "cat"])
    (('a dog', 'the dog'), ('a cat', 'the cat'))
    """
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"templates: each must hold {{}} once, where the name of the class goes, got {template!r}")
    if not templates:
        raise UserError("templates: give at least one, such as 'a photo of a {}'")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two classes are called '{twice[0]}'; give each its own name")
    return tuple(tuple(dict.fromkeys(template.replace("{}", name) for template in templates)) for name in names)


def in_turns(labels: Sequence[int]) -> list[int]:
    """Rows in an order in which the classes take turns, the rows of each in their own order.

    >>> in_turns([0, 0, 0, 1, 2, 2])
    [0, 3, 4, 1, 5, 2]
    """
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    turns = itertools.zip_longest(*(rows[label] for label in sorted(rows)))
    return [row for turn in turns for row in turn if row is not None]


def _first_object(description: Description, label: DigitsLabel) -> str:
    digit, colour = description.first_digit, description.first_colour
    return {"digit": digit, "colour": f"{colour} digit", "object": f"{colour} {digit}"}[label]


def class_names(path: Path | None, classes: Sequence[str]) -> list[str]:
    """The words for each of `classes`, out of a JSON file; None: underscores as blanks. Raises UserError naming the
    file: unreadable, or without one of them."""
    if path is None:
        return [name.replace("_", " ") for name in classes]
    try:
        words = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: the file of class names cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{path}: the file of class names is not JSON") from None
    if not isinstance(words, dict) or not all(isinstance(name, str) and name.strip() for name in words.values()):
        raise UserError(f'{path}: expected {{"class folder": "its name", ...}}')
    missing = [name for name in classes if name not in words]
    if missing:
        raise UserError(f"{path}: class '{missing[0]}' has no name there ({len(missing)} have none)")
    return [words[name] for name in classes]


def _pictures(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"{folder}: the class has no pictures; add some or remove the folder")
    return found


@dataclass(frozen=True)
class _Files:
    """Row to picture, from files."""

    paths: tuple[Path, ...]

    def __call__(self, index: int) -> Image.Image:
        return read_image(self.paths[index])
