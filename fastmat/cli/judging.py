"""The rows of a task's evaluation, made and judged: each attack once on each surrogate, its outcome by every victim."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastmat.attacks.engine import Engine
from fastmat.build import Component, build_model
from fastmat.cli.album import Album
from fastmat.cli.config import TaskConfig, TaskVictim
from fastmat.cli.encoded import Encoded
from fastmat.cli.ensembles import Variant
from fastmat.cli.fitting import FitSet, first_to_fit, fit_set
from fastmat.cli.load import plain
from fastmat.cli.making import drop_begun, files_of
from fastmat.cli.rows import Rows
from fastmat.cli.sets import Sets
from fastmat.cli.survivors import WORST, Outcome, Survivors, measured_of
from fastmat.cli.together import Processes
from fastmat.data.loader import EvaluationBatches, evaluation_batches
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError
from fastmat.evaluation.adversarial_set import AdversarialSet
from fastmat.evaluation.manifest import config_fingerprint
from fastmat.evaluation.results import Setting, Threat
from fastmat.tasks.base import Classifying, Judged, Task
from fastmat.tasks.evaluate import Seen, judge_attacked, task_row
from fastmat.tasks.results import TaskResults, TaskRow
from fastmat.tasks.uncontrasted import check_surrogate, contrasts, no_context
from fastmat.types import AttackContext


class Answers:
    """A victim, and what it says of the clean rows, asked when that is first needed."""

    def __init__(self, model: Encoded, task: Task) -> None:
        self.model = model
        self.task = task

    @cached_property
    def clean(self) -> Judged:
        return self.task.judge(self.model.model, self.model.batches)


@dataclass(kw_only=True)
class Judging:
    """What all rows of a run share. attacks: of `single_variants`.

    stop_asked: whether Ctrl-C or SIGTERM came; the batch or row at hand is finished, then KeyboardInterrupt is raised.
    Other processes than the first take part in attacks only.
    """

    config: TaskConfig
    task: Task
    device: torch.device
    engine: Engine
    attacks: Mapping[str, Sequence[Variant]]
    out: Path
    rows: Rows[TaskResults]
    processes: Processes
    stop_asked: Callable[[], bool]

    @cached_property
    def album(self) -> Album:
        return Album(self.out, task=self.task, count=self.config.examples, seed=self.config.seed)

    @cached_property
    def data(self) -> RetrievalSet:
        """The rows that are judged."""
        try:
            return self.task.data if self.config.limit is None else self.task.data.take(self.config.limit)
        except UserError as error:
            raise UserError(f"limit: {error}") from error

    @cached_property
    def fit_on(self) -> FitSet | None:
        return fit_set(self.config, self.data, needed_by=first_to_fit(self.attacks))

    @cached_property
    def sets(self) -> Sets:
        return Sets(
            out=self.out,
            dataset=self.data,
            source={"task": plain(self.config.task), "limit": self.config.limit},
            engine=self.engine,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            processes=self.processes,
            stop_asked=self.stop_asked,
        )

    @cached_property
    def survivors(self) -> Survivors:
        used = isinstance(self.task, Classifying) and len(self.attacks) > 1
        return Survivors(self.out / "right", used=used)

    def judge(self, surrogates: Mapping[str, Component], victims: Mapping[str, TaskVictim]) -> None:
        """Rows of `victims`: clean, and attacked through each of `surrogates`."""
        loaded = {
            name: self.load(
                component, where=f"surrogates.{name}" if self.config.surrogates else f"victims.{name}.model"
            )
            for name, component in surrogates.items()
            if self.attacks or self.processes.first
        }
        for name, surrogate in loaded.items():
            for label, ((_, attack, _), *_) in self.attacks.items():
                check_surrogate(attack, surrogate.model, label=f"{label} on {name}" if len(loaded) > 1 else label)
        judged = {}
        for label, victim in victims.items() if self.processes.first else ():
            equal = next((name for name in loaded if surrogates[name] == victim.model), None)
            model = loaded[equal] if equal else self.load(victim.model, where=f"victims.{label}.model")
            judged[label] = self.clean(label, model)
        for name, surrogate in loaded.items():
            for label, variants in self.attacks.items():
                for variant in variants:
                    show = variant is variants[0]
                    if not self.attack(label, variant, name, surrogate, judged, show=show):
                        break
            if self.processes.first:
                self.worst(name, judged)

    def clean(self, label: str, model: Encoded) -> Answers:
        """A victim's clean row."""
        try:
            self.task.check(model.model)
        except UserError as error:
            raise UserError(f"victims.{label}.model: {error}") from error
        answers = Answers(model, self.task)
        setting = self.setting(label, victim=label, white_box=True, seed=self.config.seed)
        inputs = self.inputs(model, {})
        if self.rows.find(setting, inputs) is None:
            resamples = self.config.resamples
            self.save(task_row(self.task, answers.clean, setting=setting, resamples=resamples, inputs=inputs))
        return answers

    def attack(
        self,
        label: str,
        variant: Variant,
        name: str,
        surrogate: Encoded,
        judged: Mapping[str, Answers],
        *,
        show: bool,
    ) -> bool:
        """One attack at one radius; whether another radius may give something else."""
        planned = self.sets.planned(label, variant, name, surrogate, self.fit_on)
        plan, folder = planned.plan, planned.folder
        settings = {
            victim: self.setting(
                name,
                victim=victim,
                white_box=answers.model.weights == surrogate.weights,
                seed=plan.seed,
                attack=label,
                threat=plan.threat,
            )
            for victim, answers in judged.items()
        }
        inputs = {victim: self.inputs(answers.model, {"set": planned.key}) for victim, answers in judged.items()}

        def missing() -> list[str]:
            ready = {victim: self.survivors.ready(of) for victim, of in inputs.items()}
            return [v for v in judged if not ready[v] or self.rows.find(settings[v], inputs[v]) is None]

        if self.processes.agreed(missing):
            self.sets.make(planned, surrogate, context=lambda: self.context(surrogate))
            for victim in missing() if self.processes.first else ():
                stored = AdversarialSet(folder)
                clean = surrogate.batches if show else None
                self.add(judged[victim], stored, settings[victim], inputs[victim], show=clean)
            if self.processes.first and not self.config.keep_sets:
                shutil.rmtree(folder)

        def moved() -> bool:
            found = {victim: self.rows.find(settings[victim], inputs[victim]) for victim in judged}
            self.survivors.outcomes.append(Outcome(surrogate=name, rows=found, inputs=inputs))
            return any(row.max_distance > 0 and row.threat.budgeted for row in found.values())

        return self.processes.agreed(moved)

    def worst(self, surrogate: str, judged: Mapping[str, Answers]) -> None:
        """The rows of the worst case over the attacks through a surrogate, budget by budget."""
        if not isinstance(self.task, Classifying):
            return
        for outcomes in self.survivors.cases(surrogate):
            for victim, answers in judged.items():
                rows, counted = zip(*((case.rows[victim], case.inputs[victim]) for case in outcomes), strict=True)
                setting = rows[0].setting().model_copy(update={"attack": WORST})
                inputs = self.inputs(answers.model, {"worst": counted})
                if self.rows.find(setting, inputs) is not None:
                    continue
                right = self.survivors.right(counted)
                if answers.clean.right is not None:
                    right &= answers.clean.right
                self.save(
                    task_row(
                        self.task,
                        self.task.counted(right),
                        setting=setting,
                        resamples=self.config.resamples,
                        inputs=inputs,
                        clean=answers.clean,
                        measured=measured_of(rows),
                    )
                )

    def context(self, surrogate: Encoded) -> AttackContext:
        """What attacks through a surrogate contrast with."""
        if not contrasts(surrogate.model):
            return no_context(self.device)
        if isinstance(self.task, Classifying):
            return self.task.context(surrogate.model, surrogate.batches)
        return surrogate.context

    def add(
        self,
        answers: Answers,
        stored: AdversarialSet,
        setting: Setting,
        inputs: str,
        *,
        show: EvaluationBatches | None,
    ) -> None:
        """A row, after its examples. show: the clean data as it was attacked."""
        seen = Seen(keep=self.album.wanted(answers.clean))
        told, measured = judge_attacked(self.task, answers.model.model, stored, clean=answers.clean, seen=seen)
        self.survivors.write(inputs, told.right)
        if show is not None:
            self.album.add(setting, show, clean=answers.clean, seen=seen, told=told)
        self.save(
            task_row(
                self.task,
                told,
                setting=setting,
                resamples=self.config.resamples,
                inputs=inputs,
                clean=answers.clean,
                measured=measured,
            )
        )

    def save(self, row: TaskRow) -> None:
        self.rows.add(row)
        if self.stop_asked():
            raise KeyboardInterrupt

    def finish(self) -> None:
        """Drop what earlier runs with other inputs have left: rows, examples, sets that were only begun."""
        self.rows.finish()
        self.survivors.finish(self.rows.results.rows)
        self.album.keep({row.setting() for row in self.rows.results.rows})
        drop_begun(self.out)

    def load(self, component: Component, *, where: str) -> Encoded:
        model = build_model(component, device=self.device, where=where)
        config = self.config
        batches = evaluation_batches(
            self.data,
            model.image_transform,
            batch_size=config.batch_size,
            workers=config.workers,
            image_cache=config.image_cache,
        )
        return Encoded(component, model, batches)

    def inputs(self, victim: Encoded, judged: Mapping[str, Any]) -> str:
        """What a row depends on: the victim, the task and its files, what it is judged on, how intervals are drawn."""
        task = {"task": plain(self.config.task), "files": files_of(self.config.task)}
        return config_fingerprint({"victim": victim.identity, "resamples": self.config.resamples, **task, **judged})

    def setting(
        self,
        surrogate: str,
        *,
        victim: str,
        white_box: bool,
        seed: int,
        attack: str = "none",
        threat: Threat | None = None,
    ) -> Setting:
        return Setting(
            surrogate=surrogate,
            victim=victim,
            white_box=white_box,
            defence=self.config.victims[victim].defence,
            attack=attack,
            threat=threat or Threat(),
            dataset=self.data.name,
            split=self.data.split,
            seed=seed,
            scoring=self.task.name,
        )
