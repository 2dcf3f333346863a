"""The examples of a task's evaluation: the same rows for every victim, before and after each attack."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

from fastmat.data.loader import EvaluationBatches
from fastmat.evaluation.results import Setting, read_json, to_json, write_atomic
from fastmat.evaluation.subset import picked
from fastmat.tasks.base import Judged, Task
from fastmat.tasks.evaluate import Seen, make_examples, pick_rows
from fastmat.tasks.results import TaskExample, TaskExamples


class Album:
    """`folder/examples.json`, written anew with every attack on every victim; nothing where `count` is 0.

    The rows are drawn once, among those that the first victim gets right when clean.
    """

    def __init__(self, folder: Path, *, task: Task, count: int, seed: int) -> None:
        self.file = folder / "examples.json"
        self.task = task
        self.count = count
        self.seed = seed
        found = read_json(self.file, TaskExamples).examples if self.file.exists() and count else []
        self.examples: list[TaskExample] = found
        # A resumed run shows the rows that it began with.
        names = dict.fromkeys(example.row for example in found)
        places = {name: row for row, name in enumerate(task.data.ids) if name in names}
        self.rows = [places[name] for name in names if name in places]

    def wanted(self, clean: Judged) -> frozenset[int]:
        """The rows to look at. clean: the answers of the first victim."""
        if not self.rows and self.count:
            self.rows = pick_rows(clean, count=self.count, seed=self.seed)
        return frozenset(self.rows)

    def add(self, setting: Setting, batches: EvaluationBatches, *, clean: Judged, seen: Seen, told: Judged) -> None:
        """batches: the clean data as it was attacked. clean, told: the victim's answers before and after; seen: what
        passed by after."""
        if not self.rows:
            return
        before = Seen(keep=frozenset(self.rows))
        for _ in before.watch(picked(batches, self.rows)):
            pass
        made = make_examples(self.task, self.rows, setting=setting, before=(before, clean), after=(seen, told))
        self.examples = [*(example for example in self.examples if example.setting != setting), *made]
        self.write()

    def keep(self, settings: Set[Setting]) -> None:
        """Drop the examples of other settings."""
        kept = [example for example in self.examples if example.setting in settings]
        if len(kept) < len(self.examples):
            self.examples = kept
            self.write()

    def write(self) -> None:
        chosen = (
            f"{len(self.rows)} rows drawn at random (seed {self.seed}), first among those that the first model gets "
            "right when nothing is attacked; the same rows for every model and attack."
        )
        write_atomic(self.file, to_json(TaskExamples(chosen=chosen, examples=self.examples)))
