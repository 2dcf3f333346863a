"""An ensemble in an evaluation: each of its runs is a cell, its row the worst case over them and over other attacks.

Where there is an ensemble, `ranks/INPUTS.safetensors` next to the results holds the ranks behind each attacked row, so
that a resumed run needs none of its adversarial sets.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fastmat.attacks.base import Attack, frozen
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.masking import UnreliableGradient, gradient_warnings
from fastmat.build import Component
from fastmat.cli.encoded import Encoded
from fastmat.evaluation.evaluate import Measured
from fastmat.evaluation.metrics import Ranks, worst_case
from fastmat.evaluation.multi_positive import Found, Retrieved, of_images
from fastmat.evaluation.results import Row, write_atomic
from fastmat.evaluation.subset import picked

WAYS = ("tr", "ir")
FIGURES = tuple(field.name for field in dataclasses.fields(Found))
Variant = tuple[Component, Attack, str | None]  # one radius; the last: hash of the masked language model


@runtime_checkable
class Ensemble(Protocol):
    """An attack of several runs, of which each query has to survive every one."""

    runs: Mapping[str, Attack]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Attacks by label, runs of an ensemble as `LABEL.RUN`. subset: how many images; ensembles: label to its runs."""

    attacks: Mapping[str, Sequence[Variant]]
    subset: Mapping[str, int]
    ensembles: Mapping[str, Sequence[str]]


def split(built: Mapping[str, Sequence[Variant]], subset: Mapping[str, int]) -> Split:
    """Every run of every ensemble as an attack of its own."""
    attacks: dict[str, Sequence[Variant]] = {}
    sizes, ensembles = dict(subset), {}
    for label, variants in built.items():
        runs: dict[str, list[Variant]] = {}
        for component, attack, sha256 in variants:
            for name, run in attack.runs.items() if isinstance(attack, Ensemble) else ():
                named = dataclasses.replace(component, arguments={**component.arguments, "run": name})
                runs.setdefault(f"{label}.{name}", []).append((named, run, sha256))
        if not runs:
            attacks[label] = variants
        else:
            attacks.update(runs)
            ensembles[label] = tuple(runs)
            sizes.update(dict.fromkeys(runs, subset[label]) if label in subset else {})
    return Split(attacks=attacks, subset=sizes, ensembles=ensembles)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A cell that has been judged: the images attacked, and by victim its row and what the row depends on."""

    label: str
    surrogate: str
    attack: Attack
    images: Sequence[int]
    rows: Mapping[str, Row]
    inputs: Mapping[str, str]


class Ensembles:
    """Which cells make which ensemble. runs: label to the labels of its runs; folder: where ranks are kept."""

    def __init__(self, runs: Mapping[str, Sequence[str]], folder: Path) -> None:
        self.runs = runs
        self.folder = folder
        self.judged: list[Judged] = []

    def file(self, inputs: str) -> Path:
        return self.folder / f"{inputs}.safetensors"

    def ready(self, inputs: str) -> bool:
        """Whether the ranks of a row are there, if they are of use."""
        return not self.runs or self.file(inputs).is_file()

    def write(self, inputs: str, ranks: Ranks) -> None:
        """Keep the ranks of a row, if they are of use."""
        if self.runs:
            write_atomic(self.file(inputs), save(tensors_of(ranks)))

    def cases(self, surrogate: str) -> Iterator[tuple[str, Sequence[Judged], Sequence[Judged]]]:
        """Label, runs, and other attacks that count, of every ensemble on `surrogate`, radius by radius.

        Another attack counts when it had the same budgets and attacked the images of the ensemble, at least.
        """
        here = [cell for cell in self.judged if cell.surrogate == surrogate]
        for label, names in self.runs.items():
            for first in [cell for cell in here if cell.label == names[0]]:
                same = [
                    cell
                    for cell in here
                    if cell.attack.threat == first.attack.threat and set(cell.images) >= set(first.images)
                ]
                runs = [cell for cell in same if cell.label in names]
                if len(runs) == len(names):
                    yield label, runs, [cell for cell in same if cell.label not in names]

    def ranks(self, cells: Sequence[Judged], victim: str, images: Sequence[int]) -> dict[str, Ranks]:
        """By label, the ranks of the queries of `images`."""
        return {
            cell.label: ranks_of_rows(ranks_from(load_file(self.file(cell.inputs[victim]))), cell.images, images)
            for cell in cells
        }

    def finish(self, rows: Sequence[Row]) -> None:
        """Remove the ranks of rows that are not among `rows`."""
        kept = {row.inputs for row in rows}
        for file in self.folder.glob("*.safetensors"):
            if file.stem not in kept:
                file.unlink()


def tensors_of(ranks: Ranks) -> dict[str, Tensor]:
    """For a file; figures under other ground truths as LABEL:WAY:FIGURE."""
    tensors = {"tr": ranks.tr, "ir": ranks.ir, "txt2img": ranks.txt2img}
    for label, found in ranks.under.items():
        for way in WAYS:
            part = getattr(found, way)
            tensors |= {f"{label}:{way}:{name}": getattr(part, name) for name in FIGURES}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def ranks_from(tensors: Mapping[str, Tensor]) -> Ranks:
    """What `tensors_of` was given."""
    labels = dict.fromkeys(name.split(":")[0] for name in tensors if ":" in name)
    under = {
        label: Retrieved(**{way: Found(**{name: tensors[f"{label}:{way}:{name}"] for name in FIGURES}) for way in WAYS})
        for label in labels
    }
    return Ranks(tr=tensors["tr"], ir=tensors["ir"], txt2img=tensors["txt2img"], under=under)


def ranks_of_rows(ranks: Ranks, have: Sequence[int], wanted: Sequence[int]) -> Ranks:
    """The queries of the images `wanted` out of those of the images `have`; both ascending, wanted within have.

    >>> some = Ranks(tr=torch.tensor([4, 5, 6]), ir=torch.tensor([1, 2, 3, 4]), txt2img=torch.tensor([0, 1, 1, 2]))
    >>> part = ranks_of_rows(some, (10, 20, 30), (20, 30))
    >>> part.tr.tolist(), part.ir.tolist(), part.txt2img.tolist()
    ([5, 6], [2, 3, 4], [0, 0, 1])
    """
    places = torch.searchsorted(torch.tensor(have), torch.tensor(wanted))
    captions = torch.isin(ranks.txt2img, places)
    return Ranks(
        tr=ranks.tr[places],
        ir=ranks.ir[captions],
        txt2img=torch.searchsorted(places, ranks.txt2img[captions]),
        under={
            label: Retrieved(**{way: of_images(getattr(found, way), torch.tensor(wanted)) for way in WAYS})
            for label, found in ranks.under.items()
        },
    )


def measured_of(rows: Sequence[Row]) -> Measured:
    """Over several rows: the largest distance, the most words, all seconds."""
    return Measured(
        distance=max(row.max_distance for row in rows),
        words=max(row.max_words_changed for row in rows),
        seconds=sum(row.seconds or 0.0 for row in rows),
    )


def warn_of_gradients(title: str, attack: Attack, surrogate: Encoded, rows: Sequence[int]) -> None:
    """What a first batch shows about the gradients of the surrogate. title: of the ensemble on it."""
    model = surrogate.model
    batch = next(iter(picked(surrogate.batches, rows))).to(model.logit_scale.device)
    with frozen(model):
        said = gradient_warnings(model, batch, surrogate.context, threat=attack.threat, draws=SeededDraws(attack.seed))
    for message in said.values():
        warnings.warn(f"{title}: {message}", UnreliableGradient, stacklevel=1)


def warn_of_square(title: str, runs: Mapping[str, Ranks]) -> None:
    """AutoAttack's sign of masking: queries that only the search without gradients wins. runs: by label."""
    square = [ranks for label, ranks in runs.items() if label.endswith(".square")]
    others = [ranks for label, ranks in runs.items() if not label.endswith(".square")]
    if not square or not others:
        return
    alone, rest = worst_case(square), worst_case(others)
    won = sum(int(((getattr(alone, way) > 0) & (getattr(rest, way) == 0)).sum()) for way in ("tr", "ir"))
    if won:
        warnings.warn(
            f"{title}: the gradient may be masked: Square, which uses none, wins {won} queries at rank 1 that every "
            "attack by gradients leaves right; give Square more queries",
            UnreliableGradient,
            stacklevel=1,
        )
