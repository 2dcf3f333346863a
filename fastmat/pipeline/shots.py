"""The pictures of the report, before and after each attack: their sets may be gone when the page is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

from fastmat.evaluation.examples import magnified, png
from fastmat.evaluation.results import read_json, to_json, write_atomic
from fastmat.pipeline.journal import Journal
from fastmat.pipeline.measure import differ
from fastmat.pipeline.results import PipelineExample, PipelineExamples, Said
from fastmat.pipeline.rows import Case, Voice
from fastmat.types import Batch


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A picture before and after, as `PipelineExample` has it."""

    clean: str
    adversarial: str
    difference: str
    magnification: int
    distance: float


class Shots:
    """`file`, examples.json: what every pipeline said of the pictures `rows`; those of an earlier run are taken over.

    ids: names of all pictures. chosen: how `rows` were, for the reader.
    """

    def __init__(self, file: Path, *, rows: Sequence[int], ids: Sequence[str], chosen: str) -> None:
        self.file = file
        self.rows = rows
        self.ids = ids
        self.chosen = chosen
        self.earlier = read_json(file, PipelineExamples).examples if file.exists() else []
        places = {ids[row]: row for row in rows}
        kept = {part.name for part in fields(Shot)}
        self._shots = {
            (example.pictures, places[example.image]): Shot(**example.model_dump(include=kept))
            for example in self.earlier
            if example.image in places
        }

    def lacks(self, pictures: str) -> bool:
        """Whether a set, by its key, has yet to be shot."""
        return any((pictures, row) not in self._shots for row in self.rows)

    def shoot(self, pictures: str, clean: Iterable[Batch], attacked: Iterable[tuple[Batch, Tensor]]) -> None:
        """pictures: the set's key. clean: at least `rows`, at its resolution. attacked: all of it, with distances."""
        before = {
            row: image
            for batch in clean
            for row, image in zip(batch.index.tolist(), batch.images, strict=True)
            if row in self.rows
        }
        for batch, distance in attacked:
            for row, image, far in zip(batch.index.tolist(), batch.images, distance.tolist(), strict=True):
                if row in before:
                    difference, magnification = magnified(before[row], image)
                    self._shots[pictures, row] = Shot(
                        clean=png(before[row]),
                        adversarial=png(image),
                        difference=png(difference),
                        magnification=magnification,
                        distance=far,
                    )

    def write(self, cases: Sequence[Case], journal: Journal, *, finished: bool) -> None:
        """The examples of `cases`; behind them, unless the run is finished, those of sets that it has not come to."""
        made = [
            self._example(case, row, journal) for case in cases for row in self.rows if not self.lacks(case.pictures)
        ]
        seen = {case.pictures for case in cases}
        waiting = [] if finished else [example for example in self.earlier if example.pictures not in seen]
        write_atomic(self.file, to_json(PipelineExamples(chosen=self.chosen, examples=[*made, *waiting])))

    def _example(self, case: Case, row: int, journal: Journal) -> PipelineExample:
        shot = self._shots[case.pictures, row]
        return PipelineExample(
            image=self.ids[row],
            pictures=case.pictures,
            setting=case.setting,
            clean=shot.clean,
            adversarial=shot.adversarial,
            difference=shot.difference,
            magnification=shot.magnification,
            distance=shot.distance,
            said=[said(voice, journal, row) for voice in case.voices if row in voice.rows],
        )


def said(voice: Voice, journal: Journal, row: int) -> Said:
    """What one voice said of one picture."""
    (before,), (after,) = journal.answers(voice.before, [row]), journal.answers(voice.after, [row])
    return Said(
        expert=voice.label,
        argument=before.argument,
        before=before.answer,
        after=after.answer,
        changed=bool(differ([before.answer], [after.answer]).item()),
    )
