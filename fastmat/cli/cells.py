"""The cells of an evaluation, made and judged: each set once, by every victim."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastmat.attacks.engine import Engine
from fastmat.build import Component, build_model
from fastmat.cli.config import EvalConfig, Victim
from fastmat.cli.encoded import Encoded
from fastmat.cli.ensembles import Ensembles, Judged, measured_of, warn_of_gradients, warn_of_square
from fastmat.cli.load import plain
from fastmat.cli.making import drop_begun, make_set, plan_set
from fastmat.cli.planning import Cell
from fastmat.cli.rows import Rows
from fastmat.cli.showcase import Showcase
from fastmat.cli.together import Processes
from fastmat.data.loader import EvaluationBatches, evaluation_batches
from fastmat.data.retrieval import RetrievalSet
from fastmat.data.truth import Truth
from fastmat.evaluation.adversarial_set import MANIFEST, AdversarialSet
from fastmat.evaluation.evaluate import Attacked, Measured, attacked_ranks, clean_row, row_of
from fastmat.evaluation.manifest import Manifest, config_fingerprint
from fastmat.evaluation.metrics import Ranks, worst_case
from fastmat.evaluation.rerank import Rerank
from fastmat.evaluation.results import Results, Row, Setting, Threat, read_json
from fastmat.evaluation.subset import attacked_subset_ranks
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import Batch


@dataclass(kw_only=True)
class Cells:
    """What all cells of a run share. cells: label to the same attack at every radius, the main one first.

    found: how many sets, finished or begun, an earlier run had left. stop_asked: whether Ctrl-C or SIGTERM came; the
    batch or row at hand is finished, then KeyboardInterrupt is raised. Other processes than the first take part in
    attacks only.
    """

    config: EvalConfig
    dataset: RetrievalSet
    device: torch.device
    engine: Engine
    cells: Mapping[str, Sequence[Cell]]
    ensembles: Ensembles
    truths: Mapping[str, Truth]
    sets: Sequence[AdversarialSet]
    out: Path
    rows: Rows[Results]
    showcase: Showcase
    processes: Processes
    stop_asked: Callable[[], bool]
    found: int = field(default=0, init=False)

    def judge(self, surrogates: Mapping[str, Component], victims: Mapping[str, Victim]) -> None:
        """Rows of `victims`: clean, attacked through each of `surrogates`, and on stored sets."""
        judged = {
            label: self.load(victim.model, where=f"victims.{label}.model", rerank=victim.rerank())
            for label, victim in victims.items()
            if self.processes.first
        }
        for label, victim in judged.items():
            self.clean(label, victim)
        for name, component in surrogates.items() if self.cells else ():
            equal = next((label for label in judged if victims[label].model == component), None)
            surrogate = judged[equal] if equal else self.load(component, where=f"surrogates.{name}")
            for cells in self.cells.values():
                for cell in cells:
                    show = cell is cells[0] and self.showcase.wants(cell.label) and name == next(iter(surrogates))
                    if not self.attack(cell, name, surrogate, judged, show=show):
                        break
            if self.processes.first:
                self.worst(name, surrogate, judged)
        for stored in self.sets:
            self.judge_stored(stored, judged)

    def clean(self, label: str, victim: Encoded) -> None:
        """A victim's clean rows: of all queries, and of the queries of every subset."""
        setting = self.setting(label, victim=label, scoring=victim.scoring, white_box=True, seed=self.config.seed)
        total = self.dataset.n_images
        chosen = {cell.rows for cells in self.cells.values() for cell in cells if len(cell.rows) < total}
        for rows in (None, *sorted(chosen, key=len)):
            inputs = self.inputs(victim, {"rows": rows})
            if self.rows.find(setting, inputs) is None:
                ranks = victim.ranks_of(rows)
                gallery_images = None if rows is None else total
                row = clean_row(ranks, setting=setting, resamples=self.config.resamples, gallery_images=gallery_images)
                self.save(row, inputs)

    def attack(
        self,
        cell: Cell,
        name: str,
        surrogate: Encoded,
        judged: Mapping[str, Encoded],
        *,
        show: bool,
    ) -> bool:
        """One cell; whether other radii may give something else: an attack that leaves images alone needs no others."""
        plan = plan_set(
            weights=surrogate.weights,
            image_transform=surrogate.model.image_transform,
            surrogate=name,
            label=cell.label,
            attack=cell.attack,
            dataset=self.dataset,
            rows=cell.rows,
            config=dict(cell.inputs),
            seed=cell.attack.seed,
            source={"data": plain(self.config.data), "limit": self.config.limit},
        )
        key = config_fingerprint({"surrogate": surrogate.identity, "rows": cell.rows, **cell.inputs})
        folder = self.out / "sets" / name / f"{cell.label}-{plan.threat.eps:.4g}-{key[:12]}"
        settings = {
            label: self.setting(
                name,
                victim=label,
                scoring=victim.scoring,
                white_box=victim.weights == surrogate.weights,
                seed=plan.seed,
                attack=cell.label,
                threat=plan.threat,
            )
            for label, victim in judged.items()
        }
        inputs = {label: self.inputs(victim, {"set": key}) for label, victim in judged.items()}

        def missing() -> list[str]:
            ready = {label: self.ensembles.ready(of) for label, of in inputs.items()}
            return [
                label for label in judged if not ready[label] or self.rows.find(settings[label], inputs[label]) is None
            ]

        if self.processes.agreed(missing):
            self.make(folder, plan, cell, surrogate)
            for label in missing() if self.processes.first else ():
                self.add(
                    judged[label],
                    AdversarialSet(folder),
                    settings[label],
                    inputs[label],
                    rows=None if len(cell.rows) == self.dataset.n_images else cell.rows,
                    show=surrogate.batches if show else None,
                )
            if self.processes.first and not self.config.keep_sets:
                shutil.rmtree(folder)

        def moved() -> bool:
            found = {label: self.rows.find(settings[label], inputs[label]) for label in judged}
            rows = {label: row for label, row in found.items() if row is not None}
            self.ensembles.judged.append(
                Judged(label=cell.label, surrogate=name, attack=cell.attack, images=cell.rows, rows=rows, inputs=inputs)
            )
            return next(iter(rows.values())).max_distance > 0

        return self.processes.agreed(moved)

    def worst(self, name: str, surrogate: Encoded, judged: Mapping[str, Encoded]) -> None:
        """The rows of ensembles on a surrogate: each query's worst rank over the runs and the other attacks."""
        for label, runs, others in self.ensembles.cases(name):
            attack, images = runs[0].attack, runs[0].images
            title, warned = f"{label} on {name}", False
            for victim, encoded in judged.items():
                setting = runs[0].rows[victim].setting().model_copy(update={"attack": label})
                counted = [cell.inputs[victim] for cell in (*runs, *others)]
                inputs = self.inputs(encoded, {"worst": counted, "rows": images})
                if self.rows.find(setting, inputs) is not None:
                    continue
                if not warned:
                    warn_of_gradients(title, attack, surrogate, images)
                    warned = True
                ranks = self.ensembles.ranks([*runs, *others], victim, images)
                if setting.white_box:
                    warn_of_square(title, {cell.label: ranks[cell.label] for cell in runs})
                measured = measured_of([cell.rows[victim] for cell in runs])
                rows = None if len(images) == self.dataset.n_images else images
                self.save(self.row(encoded, worst_case(list(ranks.values())), setting, measured, rows), inputs)

    def make(self, folder: Path, plan: Manifest, cell: Cell, surrogate: Encoded) -> None:
        """The adversarial set of a cell, unless it is there."""

        def done() -> int:
            begun = read_json(folder / MANIFEST, Manifest).n_done if (folder / MANIFEST).exists() else 0
            self.found += begun > 0
            return begun

        if self.processes.agreed(done) == plan.n_images:
            return
        made = make_set(
            folder,
            plan=plan,
            surrogate=surrogate.model,
            attack=cell.attack,
            engine=self.engine,
            batches=surrogate.batches,
            rows=cell.rows,
            context=lambda: surrogate.context,
            fit_on=cell.fit_on,
            shard_images=self.config.batch_size,
            processes=self.processes,
            stop_asked=self.stop_asked,
        )
        if made < plan.n_images:
            raise KeyboardInterrupt

    def judge_stored(self, stored: AdversarialSet, judged: Mapping[str, Encoded]) -> None:
        """A stored set, measured against the clean images; it is white box for the victim whose weights made it."""
        made = stored.manifest
        batches = self.batches(made)
        measured = False
        for label, victim in judged.items():
            white_box = victim.weights == made.model
            setting = self.setting(
                made.surrogate,
                victim=label,
                scoring=victim.scoring,
                white_box=white_box,
                seed=made.seed,
                attack=made.attack,
                threat=made.threat,
            )
            inputs = self.inputs(victim, {"stored": made.model_dump(mode="json")})
            if self.rows.find(setting, inputs) is None:
                if not measured:
                    stored.check_budget(batches)
                    measured = True
                show = batches if self.showcase.wants(made.attack) else None
                self.add(victim, stored, setting, inputs, rows=None, show=show)

    def add(
        self,
        victim: Encoded,
        attacked: Iterable[Attacked],
        setting: Setting,
        inputs: str,
        *,
        rows: Sequence[int] | None,
        show: Iterable[Batch] | None,
    ) -> None:
        """A row, after its examples. rows: the images attacked, None: all. show: the clean data as it was attacked."""
        if rows is None:
            ranks, measured = attacked_ranks(
                victim.model, attacked, clean=victim.ranks, rerank=victim.rerank, truths=self.truths
            )
        else:
            ranks, measured = attacked_subset_ranks(
                victim.model, attacked, clean=victim.gallery, rows=rows, truths=self.truths
            )
        self.ensembles.write(inputs, ranks)
        if show is not None:
            self.showcase.add(victim.model, show, attacked, victim.ranks, setting, rerank=victim.rerank)
        self.save(self.row(victim, ranks, setting, measured, rows), inputs)

    def row(
        self, victim: Encoded, ranks: Ranks, setting: Setting, measured: Measured, rows: Sequence[int] | None
    ) -> Row:
        """rows: the images whose queries the ranks are, None: all."""
        return row_of(
            ranks,
            victim.ranks_of(rows),
            setting=setting,
            resamples=self.config.resamples,
            measured=measured,
            gallery_images=None if rows is None else self.dataset.n_images,
        )

    def save(self, row: Row, inputs: str) -> None:
        self.rows.add(row.model_copy(update={"inputs": inputs}))
        if self.stop_asked():
            raise KeyboardInterrupt

    def finish(self) -> None:
        """Drop what earlier runs with other inputs have left: rows, examples, sets that were only begun."""
        self.rows.finish()
        self.ensembles.finish(self.rows.results.rows)
        self.showcase.keep({row.setting() for row in self.rows.results.rows})
        drop_begun(self.out)

    def load(self, component: Component, *, where: str, rerank: Rerank | None = None) -> Encoded:
        model = build_model(component, device=self.device, where=where)
        return Encoded(component, model, self.batches(model), rerank=rerank, truths=self.truths)

    def batches(self, wanted: VisionLanguageModel | Manifest) -> EvaluationBatches:
        """The data as a model wants it, or as a set was made of it."""
        config = self.config
        return evaluation_batches(
            self.dataset,
            wanted.image_transform,
            batch_size=config.batch_size,
            workers=config.workers,
            image_cache=config.image_cache,
        )

    def inputs(self, victim: Encoded, judged: Mapping[str, Any]) -> str:
        """What a row depends on: the victim, what it is judged on and under, and how intervals are drawn."""
        victims = {"victim": victim.identity, "resamples": self.config.resamples, **victim.second_stage}
        if self.truths:
            victims["truths"] = {label: truth.fingerprint() for label, truth in self.truths.items()}
        return config_fingerprint({**victims, **judged})

    def setting(
        self,
        surrogate: str,
        *,
        victim: str,
        scoring: str,
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
            dataset=self.dataset.name,
            split=self.dataset.split,
            seed=seed,
            scoring=scoring,
        )
