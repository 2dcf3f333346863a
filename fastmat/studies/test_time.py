"""Test-time defences, honestly attacked.

A guard changes images before a model encodes them. What it is said to give is measured by attacks on the model without
it (claimed); what it gives, by attacks through it, which average over its randomness and differentiate what can be
differentiated (adaptive). The same attacks, budget and images for the bare model stand beside. Captions stay as they
are: an attack on words goes past every guard.

    fastmat study test-time --out runs/test-time
    fastmat study test-time --config benchmarks/flickr8k/test-time.yaml --out runs/test-time-flickr8k
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.build import (
    GUARDS,
    Component,
    build,
    build_attack,
    build_data,
    build_threat,
    locate,
    parameters_of,
    resolve_device,
)
from fastmat.cli.common import MlmLoader, open_candidates
from fastmat.cli.load import plain
from fastmat.evaluation.evaluate import Measured, encode_gallery, gallery_context, run_attack
from fastmat.evaluation.manifest import config_fingerprint
from fastmat.evaluation.results import environment
from fastmat.evaluation.stages import Stages, counts_of, stages_of
from fastmat.guards.base import Guard
from fastmat.guards.evading import EvadingPGD
from fastmat.guards.guarded import Guarded
from fastmat.models.protocol import VisionLanguageModel
from fastmat.models.weights import read_state, save_state
from fastmat.studies.outcomes import read_outcome, write_outcome
from fastmat.studies.test_time_config import EVADING, NO_GUARD, Config
from fastmat.studies.test_time_report import write_study
from fastmat.studies.test_time_results import Detection, Line, TestTimeResults
from fastmat.studies.test_time_subjects import Subject, Subjects, say
from fastmat.studies.test_time_verdicts import CLEAN, Bootstrap, Made, answer, detection, judge, with_means
from fastmat.types import Batch

CONFIG = "test-time-study"
WAYS = {"bare": "made on the bare model", "guard": "made through the guard"}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What images did to one model and guard. scores [N] float32: the detector's; None: there is none."""

    stages: Stages
    scores: Tensor | None


class Study:
    """Everything that `config` asks for, below `out`; what is finished there is not computed again."""

    def __init__(self, config: Config, out: Path) -> None:
        self.config = config
        self.out = out
        self.device = resolve_device(config.device)
        self.threat = replace(build_threat(config.threat), max_words=0)  # guards do nothing about words
        self.dataset = build_data(config.data, limit=config.limit)
        self.mlm = MlmLoader(config.mlm or (str(out / "mlm") if config.mlm_steps else None), self.device)
        self.candidates = open_candidates(out / "candidates")
        for label, guard in config.guards.items():
            build(GUARDS, guard, where=f"guards.{label}")
        self.subjects = Subjects(config, out, dataset=self.dataset, attack=self.attack, mlm=self.mlm)

    def run(self) -> TestTimeResults:
        """Train, attack, judge, and write results.json, README.md, report.html and plots."""
        (self.out / "models").mkdir(parents=True, exist_ok=True)  # the sign that there is something to go on with
        self.subjects.train_mlm()
        for label, component in self.config.attacks.items():  # a mistake in one is found before anything is trained
            self.attack(component, where=f"attacks.{label}")
        found = {label: self.outcomes(self.subjects.make(label, self.device)) for label in self.config.models}
        results = self.results(found)
        write_study(self.out, results)
        return results

    def outcomes(self, subject: Subject) -> dict[str, dict[Made, Found]]:
        """Guard to what was made to what it did; the bare model first, clean images first."""
        cells = [(NO_GUARD, made) for made in (CLEAN, *((name, "bare") for name in self.config.attacks))]
        for guard in self.config.guards:
            ways = [(name, way) for way in ("bare", "guard") for name in self.config.attacks]
            more = [(EVADING, "guard")] if self.detecting(guard, subject) else []
            cells += [(guard, made) for made in (CLEAN, *ways, *more)]
        inputs = {cell: self.inputs(subject, *cell) for cell in cells}
        found = {cell: self.read(subject, *cell, inputs=inputs[cell]) for cell in cells}
        missing = [cell for cell, outcome in found.items() if outcome is None]
        kept: dict[str, list[Batch]] = {}  # made on the bare model, for all guards
        for guard, (attack, way) in missing:
            say(f"{subject.label}, {guard}: {f'{attack}, {WAYS[way]}' if way else 'clean'}")
            images: Iterable[Batch]
            if not way:
                images = self.subjects.batches(subject.model, self.dataset)
            elif way == "guard":
                images = self.attacked(subject, guard, attack)
            else:
                if attack not in kept:
                    kept[attack] = list(self.attacked(subject, NO_GUARD, attack))
                images = kept[attack]
            cell = guard, (attack, way)
            found[cell] = outcome = self.judged(subject, guard, images)
            self.write(subject, *cell, outcome, inputs=inputs[cell])
        return {
            guard: {made: outcome for (own, made), outcome in found.items() if own == guard and outcome is not None}
            for guard in (NO_GUARD, *self.config.guards)
        }

    def judged(self, subject: Subject, guard: str, images: Iterable[Batch]) -> Found:
        """As deployed: one draw of the guard per image."""
        scores: list[Tensor] = []

        def seen() -> Iterator[Batch]:
            for batch in images:
                if subject.detects is not None:
                    with torch.no_grad():
                        scores.append(subject.detects(batch.images.to(self.device)).cpu())
                yield batch

        stages = stages_of(encode_gallery(self.guarded(subject, guard, draws=1, seed=self.config.seed), seen()))
        return Found(stages=stages, scores=torch.cat(scores) if scores else None)

    def attacked(self, subject: Subject, guard: str, attack: str) -> Iterator[Batch]:
        """Every image attacked through `guard`, whose draws are not those that it is judged with."""
        if attack == EVADING:
            assert subject.detects is not None and self.config.detector is not None
            steps = self.config.detector.evading_steps
            run: Attack = EvadingPGD(threat=self.threat, detector=subject.detects, steps=steps, seed=self.config.seed)
            surrogate = subject.model  # what the guard does to an image that it does not flag
        else:
            run = self.attack(self.config.attacks[attack], where=f"attacks.{attack}")
            draws = self.config.draws.get(attack, 1)
            surrogate = self.guarded(subject, guard, draws=draws, seed=self.config.seed + 1)
        batches = self.subjects.batches(subject.model, self.dataset)
        context = gallery_context(encode_gallery(surrogate, batches))
        return Measured().watch(run_attack(surrogate, run, batches, context))

    def guarded(self, subject: Subject, guard: str, *, draws: int, seed: int) -> VisionLanguageModel:
        if guard == NO_GUARD:
            return subject.model
        component = build(GUARDS, self.guard(guard, subject), where=f"guards.{guard}")
        model = Guarded(model=subject.model, guard=component, draws=draws, seed=seed).to(self.device).eval()
        return cast("VisionLanguageModel", model)

    def guard(self, label: str, subject: Subject) -> Component:
        """The guard with the model's detector, where it takes one and names none."""
        own = self.config.guards[label]
        takes = "detector" in parameters_of(locate(GUARDS[own.name])) and "detector" not in own.arguments
        if subject.detector is None or not takes:
            return own
        return Component(name=own.name, arguments={**own.arguments, "detector": str(subject.detector)})

    def draws_anew(self, label: str) -> bool:
        """Whether a guard is random, so that draws of it differ."""
        return cast("type[Guard]", locate(GUARDS[self.config.guards[label].name])).random

    def detecting(self, label: str, subject: Subject) -> bool:
        """Whether the guard acts on what the model's own detector flags."""
        return self.guard(label, subject) is not self.config.guards[label]

    def results(self, found: Mapping[str, Mapping[str, Mapping[Made, Found]]]) -> TestTimeResults:
        bootstrap = Bootstrap(self.dataset.n_images, resamples=self.config.resamples)
        lines, verdicts = [], []
        detections: list[Detection] = []
        for model, guards in found.items():
            counts = {
                guard: {made: with_means(counts_of(own.stages, "itc")) for made, own in outcomes.items()}
                for guard, outcomes in guards.items()
            }
            for guard, measured in counts.items():
                for (attack, way), own in measured.items():
                    through = way == "guard" and attack != EVADING and self.draws_anew(guard)
                    lines.append(
                        Line(
                            model=model,
                            guard=guard,
                            attack=attack,
                            made=way,
                            draws=self.config.draws.get(attack, 1) if through else 1,
                            values={metric: bootstrap.estimate(of) for metric, of in own.items()},
                        )
                    )
                if guard != NO_GUARD:
                    metric = f"r@{self.config.at}"
                    verdicts.append(judge(model, guard, measured, counts[NO_GUARD], metric, bootstrap))
            detections += self.detections(model, guards, bootstrap)
        return TestTimeResults(
            study="test-time",
            dataset=f"{self.dataset.name}/{self.dataset.split}",
            n_images=self.dataset.n_images,
            n_captions=self.dataset.n_captions,
            at=self.config.at,
            answer=answer(verdicts, at=self.config.at),
            verdicts=verdicts,
            lines=lines,
            detectors=detections,
            config=plain(self.config),
            environment=environment(self.device),
        )

    def detections(
        self, model: str, guards: Mapping[str, Mapping[Made, Found]], bootstrap: Bootstrap
    ) -> Iterator[Detection]:
        """Of what was made on the bare model, and of what was made through a guard that listens to the detector."""
        clean = guards[NO_GUARD][CLEAN].scores
        if clean is None:
            return
        for guard, outcomes in guards.items():
            way = "bare" if guard == NO_GUARD else "guard" if (EVADING, "guard") in outcomes else None
            for (attack, made), own in outcomes.items():
                if made == way and own.scores is not None:
                    against = attack if made == "bare" or attack == EVADING else f"{attack} through {guard}"
                    yield detection(model, against, clean, own.scores, bootstrap, adaptive=made == "guard")

    def inputs(self, subject: Subject, guard: str, made: Made) -> str:
        """sha256 of all that a cell depends on."""
        attack, way = made
        of_attack = self.config.attacks[attack].plain() if attack in self.config.attacks else attack
        return config_fingerprint(
            {
                "model": subject.key,
                "guard": None if guard == NO_GUARD else self.config.guards[guard].plain(),
                "detector": subject.detector and subject.detector.name,
                "attack": of_attack,
                "way": way,
                "draws": self.config.draws.get(attack, 1),
                "steps": self.config.detector.evading_steps if attack == EVADING and self.config.detector else None,
                "data": self.dataset.fingerprint(),
                "threat": self.config.threat,
                "batch_size": self.config.test_batch_size,
                "mlm": self.config.mlm,
                "seed": self.config.seed,
            }
        )

    def read(self, subject: Subject, guard: str, made: Made, *, inputs: str) -> Found | None:
        file = self.file(subject, guard, made)
        stages, scores = read_outcome(file, inputs=inputs), file.with_suffix(".scores.safetensors")
        if stages is None:
            return None
        return Found(stages=stages, scores=read_state(scores)["scores"] if subject.detector else None)

    def write(self, subject: Subject, guard: str, made: Made, found: Found, *, inputs: str) -> None:
        file = self.file(subject, guard, made)
        file.parent.mkdir(parents=True, exist_ok=True)
        if found.scores is not None:
            save_state({"scores": found.scores}, file.with_suffix(".scores.safetensors"))
        write_outcome(file, found.stages, inputs=inputs)

    def file(self, subject: Subject, guard: str, made: Made) -> Path:
        name = "-".join(part for part in made if part)
        return self.out / "cells" / subject.label / guard / f"{name}.safetensors"

    def attack(self, component: Component, *, where: str) -> Attack:
        return build_attack(
            component,
            threat=self.threat,
            mlm=self.mlm,
            seed=self.config.seed,
            candidate_cache=self.candidates,
            where=where,
        )


def run(config: Config, out: Path) -> None:
    """Everything that `config` asks for, in `out`."""
    results = Study(config, out).run()
    print(*results.answer)
    print(out / "report.html")
