"""Dynamic against static channel-wise correction of what an attack does to features.

An attack shifts features channel by channel. Does correcting that shift make a model more robust, and must the
correction depend on the input? Misalignment is measured first: what share of the shift a constant removes at all. Then
corrections, estimated or trained on calibration pairs of the training split with the encoder frozen, stand behind the
projections of plain and hardened models and are attacked: through themselves, which is what counts, and without.

    fastmat study channel-alignment --out runs/channel-alignment
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from fastmat.alignment.pairs import check_held_out
from fastmat.alignment.training import GateSettings
from fastmat.attacks.base import Attack
from fastmat.build import Component, build_attack, build_data, build_model, build_threat, check_weights, resolve_device
from fastmat.cli.common import MlmLoader, open_candidates
from fastmat.cli.load import plain
from fastmat.data.loader import evaluation_batches
from fastmat.errors import UserError
from fastmat.evaluation.manifest import config_fingerprint
from fastmat.evaluation.rerank import Rerank
from fastmat.evaluation.results import environment
from fastmat.evaluation.subset import draw_rows, picked
from fastmat.models.weights import weights_hash
from fastmat.studies.channel_alignment_answer import answer
from fastmat.studies.channel_alignment_cells import Run, Subject
from fastmat.studies.channel_alignment_config import STATIC, Config
from fastmat.studies.channel_alignment_fitting import NONE, Calibration
from fastmat.studies.channel_alignment_report import write_study
from fastmat.studies.channel_alignment_results import AlignmentResults, Layer, Removed
from fastmat.studies.channel_alignment_results import Calibration as Calibrated
from fastmat.studies.channel_alignment_rows import Found, changes_against, rows_of
from fastmat.studies.trained import Trained, started, trained, untrained
from fastmat.training.mlm import train_mlm

__all__ = ["CONFIG", "Config", "run"]

CONFIG = "channel-alignment-study"


class Study:
    """Everything that `config` asks for, below `out`; what is finished there is not computed again."""

    def __init__(self, config: Config, out: Path) -> None:
        self.config = config
        self.out = out
        self.device = resolve_device(config.device)
        self.threat = build_threat(config.threat)
        self.dataset = build_data(config.data, limit=config.limit)
        self.train_set = build_data(config.train_data, where="train_data")
        check_held_out(self.train_set, self.dataset)
        if config.calibration_images > self.train_set.n_images:
            raise UserError(
                f"calibration_images must be at most the {self.train_set.n_images} images of train_data, got "
                f"{config.calibration_images}"
            )
        for label, count in config.subset.items():
            if count > self.dataset.n_images:
                raise UserError(
                    f"subset.{label} must be at most {self.dataset.n_images}, the images of data, got {count}"
                )
        for label, victim in config.models.items():
            check_weights(victim.model, where=f"models.{label}.model")
        self.mlm = MlmLoader(config.mlm or (str(out / "mlm") if config.mlm_steps else None), self.device)
        self.candidates = open_candidates(out / "candidates")
        self.losses: dict[str, list[dict[str, float]]] = {}
        self.layers: list[Layer] = []
        self.removed: list[Removed] = []

    def run(self) -> AlignmentResults:
        """Train, calibrate, measure, attack, and write results.json, README.md, report.html and plots."""
        (self.out / "models").mkdir(parents=True, exist_ok=True)  # the sign that there is something to go on with
        if self.config.mlm is None and self.config.mlm_steps and not (self.out / "mlm").exists():
            say("masked language model")
            train_mlm(self.training_captions, self.out / "mlm", seed=0, steps=self.config.mlm_steps)
        self.runs(seed=0)  # a mistake in an attack is found before minutes of training
        self.attack(self.config.calibration, seed=0, where="calibration")
        found: list[Found] = []
        for done, seed in enumerate(self.config.seeds, 1):
            found.append(self.outcomes(seed, first=done == 1))
            results = self.results(found)
            write_study(self.out, results)  # of all seeds so far
        return results

    def outcomes(self, seed: int, *, first: bool) -> Found:
        """Model, correction, (attack, made on) to ranks."""
        config = self.config
        subjects = {label: self.subject(label, seed) for label in config.labels}
        runs = self.runs(seed=seed)
        found: Found = {}
        for label, subject in subjects.items():
            calibration = self.calibration(subject, seed)
            corrections = calibration.corrections(config.corrections)
            self.losses.setdefault(label, []).append(calibration.losses())
            keys = {NONE: NONE} | {name: calibration.inputs(name, config.corrections) for name in config.corrections}
            for attack in config.not_adaptive if first else ():
                layers, removed = subject.measured(
                    runs[attack], corrections, keys=keys, seed=seed, resamples=config.resamples
                )
                self.layers += layers
                self.removed += removed
            for name, modules in corrections.items():
                source = subjects[config.source_of(label)]
                handed = [("other", runs[attack], source) for attack in config.transfer]
                if name != NONE:  # never without the adaptive attack beside it
                    beside = [attack for attack in config.not_adaptive if self.wanted(attack, name)]
                    handed = [*(("uncorrected", runs[attack], subject) for attack in beside), *handed]
                through = [run for run in runs.values() if self.wanted(run.label, name)]
                ranks = subject.outcomes(name, modules, key=keys[name], adaptive=through, handed=handed)
                found[label, name] = ranks
        return found

    def wanted(self, attack: str, correction: str) -> bool:
        """Whether the attack runs through the correction."""
        return correction == NONE or correction in self.config.only.get(attack, (correction,))

    def subject(self, label: str, seed: int) -> Subject:
        component, rerank_k, rerank_cosine = self.component(label, seed)
        model = build_model(component, where=f"models.{label}.model", device=self.device)
        assert isinstance(model, nn.Module)
        rerank = None if rerank_k is None else Rerank(k=rerank_k, plus_cosine=rerank_cosine)
        if rerank is not None:
            rerank.scoring(model)  # refuses a model without a matching head
        return Subject(
            label=label,
            key=weights_hash(model),
            model=model,
            sites=self.config.sites,
            rerank=rerank,
            batches=evaluation_batches(
                self.dataset,
                model.image_transform,
                batch_size=self.config.test_batch_size,
                workers=self.config.workers,
            ),
            folder=self.out / "cells" / f"seed-{seed}" / label,
            say=say,
        )

    def calibration(self, subject: Subject, seed: int) -> Calibration:
        config = self.config
        rows = draw_rows(self.train_set.n_images, config.calibration_images, seed=seed)
        batches = evaluation_batches(
            self.train_set,
            subject.model.image_transform,
            batch_size=config.test_batch_size,
            workers=config.workers,
        )
        return Calibration(
            model=subject.model,
            key=config_fingerprint(
                {
                    **self.shared(seed),
                    "model": subject.key,
                    "data": self.train_set.fingerprint(),
                    "rows": rows,
                    "sites": config.sites,
                    "attack": config.calibration.plain(),
                }
            ),
            name=subject.label,
            sites=config.sites,
            batches=picked(batches, rows),
            attack=self.attack(config.calibration, seed=seed, where="calibration"),
            gate=GateSettings(**config.gate),
            folder=self.out / "corrections" / f"seed-{seed}" / subject.label,
            seed=seed,
        )

    def runs(self, *, seed: int) -> dict[str, Run]:
        """The attacks by label; those on some images draw the same ones for every seed."""
        made = {}
        for label, component in self.config.attacks.items():
            count = self.config.subset.get(label)
            rows = None if count is None else draw_rows(self.dataset.n_images, count, seed=self.config.seeds[0])
            told = {**self.shared(seed), "attack": component.plain(), "rows": rows}
            made[label] = Run(
                label=label,
                attack=self.attack(component, seed=seed, where=f"attacks.{label}"),
                rows=rows,
                inputs=config_fingerprint({**told, "data": self.dataset.fingerprint()}),
            )
        return made

    def shared(self, seed: int) -> dict[str, Any]:
        """What everything attacked depends on."""
        told = {"threat": self.config.threat, "batch_size": self.config.test_batch_size, "seed": seed}
        return {**told, "mlm": self.config.mlm, "mlm_steps": self.config.mlm_steps}

    def attack(self, component: Component, *, seed: int, where: str) -> Attack:
        made = build_attack(
            component, threat=self.threat, mlm=self.mlm, seed=seed, candidate_cache=self.candidates, where=where
        )
        if made.needs_fit:
            raise UserError(f"{where}: {component.name} learns from other images first, which this study does not do")
        return made

    def component(self, label: str, seed: int) -> tuple[Component, int | None, bool | None]:
        """The model, trained if it is to be and is not there, and how it re-ranks."""
        if label in self.config.models:
            victim = self.config.models[label]
            return victim.model, victim.rerank_k, victim.rerank_cosine
        section = self.config.trained
        assert section is not None
        told = {"defence": section.defences[label].plain(), "train": section.train}
        model = self.train(self.start(seed), told, f"seed-{seed}/{label}", seed=seed)
        return model.component(), section.rerank_k, None

    def start(self, seed: int) -> Trained:
        """Where all models of a seed begin."""
        section = self.config.trained
        assert section is not None
        begin = untrained(started(section.model, seed=seed, words=lambda: self.words))
        told = {"defence": "finetune", "train": section.pretrain}
        return self.train(begin, told, f"seed-{seed}/start", seed=seed)

    def train(self, start: Trained, told: Mapping[str, Any], name: str, *, seed: int) -> Trained:
        section = self.config.trained
        assert section is not None
        values = {
            "data": self.config.train_data.plain(),
            "mlm": self.mlm.folder,
            "candidate_cache": str(self.out / "candidates"),
            "threat": self.config.threat,
            "batch_size": section.batch_size,
            "matching": section.matching,
            "workers": self.config.workers,
            "tracker": "none",
            "seed": seed,
            **told,
        }
        return trained(start, values, self.out / "models" / name, mlm=self.config.mlm, source=CONFIG)

    @cached_property
    def training_captions(self) -> list[str]:
        return [caption for own in self.train_set.captions for caption in own]

    @property
    def words(self) -> list[str]:
        return sorted({word for caption in self.training_captions for word in caption.lower().split()})

    def results(self, found: Sequence[Found]) -> AlignmentResults:
        config = self.config
        losses = {model: mean_losses(of_seeds) for model, of_seeds in self.losses.items()}
        static = [label for label, choice in config.corrections.items() if choice.kind in STATIC]
        dynamic = next((label for label, choice in config.corrections.items() if choice.kind == "gate"), None)
        chosen = {model: min(static, key=own.__getitem__) for model, own in losses.items()} if static else {}
        partial = sorted({*config.subset, *config.only})
        every = range(self.dataset.n_images)
        images = {label: run.rows or every for label, run in self.runs(seed=config.seeds[0]).items()}
        results = AlignmentResults(
            study="channel-alignment",
            answer=[],
            dataset=f"{self.dataset.name}/{self.dataset.split}",
            n_images=self.dataset.n_images,
            n_captions=self.dataset.n_captions,
            seeds=len(found),
            calibration=Calibrated(
                dataset=f"{self.train_set.name}/{self.train_set.split}",
                n_images=config.calibration_images,
                losses=losses,
            ),
            chosen=chosen,
            dynamic=dynamic,
            misalignment=self.layers,
            removed=self.removed,
            rows=list(rows_of(found, images=images, partial=partial, resamples=config.resamples)),
            versus=list(changes_against(found, dynamic, images=images, partial=partial, resamples=config.resamples)),
            config=plain(config),
            environment=environment(self.device),
        )
        return results.model_copy(update={"answer": answer(results)})


def mean_losses(of_seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {label: sum(own[label] for own in of_seeds) / len(of_seeds) for label in of_seeds[0]}


def say(stage: str) -> None:
    print(f"- {stage}", flush=True)


def run(config: Config, out: Path) -> None:
    """Everything that `config` asks for, in `out`."""
    results = Study(config, out).run()
    for sentence in results.answer:
        print(sentence)
    print(out / "report.html")
