"""Rank images and captions of a data set, clean and attacked, by one victim or several.

Writes results.json, examples.json and report.html. A victim is attacked through its own gradients
(white box) unless `surrogate` names another model. Resumable, row by row.

    fastmat eval --config clip-vit-b16-flickr30k-eval --out runs/eval
    fastmat eval --config clip-vit-b16-flickr30k-eval --out runs/sets 'sets=[runs/sga]' 'attacks={}'
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fastmat.attacks.base import Attack
from fastmat.build import (
    Component,
    build_attack,
    build_data,
    build_model,
    build_threat,
    check_weights,
    resolve_device,
)
from fastmat.cli.common import (
    Interrupted,
    MlmLoader,
    add_config_arguments,
    check_out,
    counted,
    fingerprint,
    label_of,
    progress,
)
from fastmat.cli.config import EvalConfig, Victim
from fastmat.cli.keys import describe
from fastmat.cli.load import load_config, plain
from fastmat.cli.parser import Parser
from fastmat.cli.rows import Rows
from fastmat.cli.showcase import Showcase
from fastmat.cli.table import radius, table
from fastmat.data.loader import EvaluationBatches, evaluation_batches
from fastmat.data.retrieval import RetrievalSet
from fastmat.evaluation.adversarial_set import AdversarialSet
from fastmat.evaluation.evaluate import (
    Attacked,
    clean_ranks,
    clean_row,
    encode_gallery,
    evaluate,
    gallery_context,
    run_attack,
)
from fastmat.evaluation.metrics import Ranks
from fastmat.evaluation.results import Results, Row, Setting, Threat, environment
from fastmat.models.protocol import VisionLanguageModel
from fastmat.report.html import write_report
from fastmat.training.interrupt import interruptible
from fastmat.types import AttackContext, Batch, ImageTransform

SPEED_KEYS = ("batch_size", "workers")


def add_arguments(parser: Parser) -> None:
    add_config_arguments(parser, resume=True)
    parser.keys = partial(describe, EvalConfig)


def run(arguments: argparse.Namespace) -> None:
    config = load_config(EvalConfig, arguments.config, arguments.settings)
    check_out(arguments.out, resume=arguments.resume, sign="results.json")
    try:
        results = evaluate_models(config, arguments.out, resume=arguments.resume)
    except KeyboardInterrupt as error:
        file = arguments.out / "results.json"
        said = f"finished rows are in {file}; the same command with --resume goes on" if file.exists() else None
        raise Interrupted(said or "no row was finished, nothing was written") from error
    print(table(results.rows))
    print(write_report(arguments.out))


def evaluate_models(config: EvalConfig, out: Path, *, resume: bool = False) -> Results:
    """Every row that `config` asks for, in `out/results.json`, and the report."""
    threat = build_threat(config.threat)
    device = resolve_device(config.device)
    for label, victim in config.victims.items():
        check_weights(victim.model, where=f"victims.{label}.model")
    mlm = MlmLoader(config.mlm, device)
    more = [build_threat({**config.threat, "eps": eps}, where="eps") for eps in config.eps]
    radii = [threat, *(other for other in more if other != threat)]
    attacks = {
        label: [build_attack(c, threat=t, mlm=mlm, seed=config.seed, where=f"attacks.{label}") for t in radii]
        for label, c in config.attacks.items()
    }
    dataset = build_data(config.data, limit=config.limit)
    sets = [AdversarialSet(folder, data=dataset.fingerprint()) for folder in config.sets]
    resolved = {key: value for key, value in plain(config).items() if key not in SPEED_KEYS}
    resolved["mlm_sha256"] = mlm.sha256
    rows = Rows(out, config=resolved, environment=environment(device), resume=resume)
    shown = [*attacks, *(stored.manifest.attack for stored in sets)]
    showcase = Showcase(
        out, attack=shown[-1] if shown else None, count=config.examples, seed=config.seed, ids=dataset.ids
    )
    with interruptible() as stop_asked:
        bench = Bench(
            config=config,
            dataset=dataset,
            device=device,
            attacks=attacks,
            sets=sets,
            rows=rows,
            showcase=showcase,
            stop_asked=stop_asked,
        )
        if config.surrogate is not None:
            bench.judge(label_of(config.surrogate), config.surrogate, config.victims)
        else:
            for label, victim in config.victims.items():
                bench.judge(label, victim.model, {label: victim})
    write_report(out)
    return rows.results


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all rows of a run share. attacks: label to the same attack at every radius, the main one first.

    stop_asked: whether Ctrl-C came; the batch or row at hand is finished, then KeyboardInterrupt is raised.
    """

    config: EvalConfig
    dataset: RetrievalSet
    device: torch.device
    attacks: Mapping[str, Sequence[Attack]]
    sets: Sequence[AdversarialSet]
    rows: Rows
    showcase: Showcase
    stop_asked: Callable[[], bool]

    def judge(self, name: str, surrogate: Component, victims: Mapping[str, Victim]) -> None:
        """Rows of `victims`: clean, attacked through `surrogate` (called `name` in the table), and on stored sets."""
        attacked_model = build_model(surrogate, device=self.device, where="surrogate")
        models = {
            label: attacked_model
            if victim.model == surrogate
            else build_model(victim.model, device=self.device, where=f"victims.{label}.model")
            for label, victim in victims.items()
        }
        clean = {label: self.clean(label, model) for label, model in models.items()}
        if self.attacks:
            batches = self.batches(attacked_model.image_transform)
            context = gallery_context(encode_gallery(attacked_model, batches))
            for label, attacks in self.attacks.items():
                self.judge_attack(label, attacks, name, attacked_model, models, clean, batches, context)
        for stored in self.sets:
            self.judge_set(stored, models, clean)

    def clean(self, label: str, model: VisionLanguageModel) -> Ranks:
        """A victim's clean ranks, and their row."""
        ranks = clean_ranks(model, self.batches(model.image_transform))
        setting = self.setting(label, victim=label, seed=self.config.seed)
        if self.rows.find(setting) is None:
            self.save(clean_row(ranks, setting=setting, resamples=self.config.resamples))
        return ranks

    def judge_attack(
        self,
        label: str,
        attacks: Sequence[Attack],
        name: str,
        surrogate: VisionLanguageModel,
        models: Mapping[str, VisionLanguageModel],
        clean: Mapping[str, Ranks],
        batches: EvaluationBatches,
        context: AttackContext,
    ) -> None:
        """One attack at every radius, white box for the victim that is the surrogate.

        An attack that leaves images alone at the first radius needs no others.
        """
        for attack in attacks:
            budget = Threat(eps=attack.threat.eps, norm=attack.threat.norm, max_words=attack.threat.max_words)
            settings = {
                victim: self.setting(
                    victim if model is surrogate else name, victim=victim, attack=label, threat=budget, seed=attack.seed
                )
                for victim, model in models.items()
            }
            if any(self.rows.find(setting) is None for setting in settings.values()):
                shown = attack is attacks[0] and self.showcase.wants(label)
                with progress(self.dataset.n_captions, f"{label} on {name}, {radius(budget)}") as bar:
                    attacked: Iterable[Attacked] = counted(
                        run_attack(surrogate, attack, batches, context), bar, stop_asked=self.stop_asked
                    )
                    if shown or len(models) > 1:
                        attacked = list(attacked)
                    for victim, setting in settings.items():
                        self.add(models[victim], attacked, clean[victim], setting, show=batches if shown else None)
            row = self.rows.find(next(iter(settings.values())))
            if row is not None and row.max_distance == 0:
                break

    def judge_set(
        self, stored: AdversarialSet, models: Mapping[str, VisionLanguageModel], clean: Mapping[str, Ranks]
    ) -> None:
        """A stored set, measured against the clean images; it is white box for the victim whose weights made it."""
        made = stored.manifest
        batches = self.batches(made.image_transform)
        measured = False
        for label, model in models.items():
            surrogate = label if fingerprint(model) == made.model else made.surrogate
            setting = self.setting(surrogate, victim=label, attack=made.attack, threat=made.threat, seed=made.seed)
            if self.rows.find(setting) is None:
                if not measured:
                    stored.check_budget(batches)
                    measured = True
                show = batches if self.showcase.wants(made.attack) else None
                self.add(model, stored, clean[label], setting, show=show)

    def add(
        self,
        model: VisionLanguageModel,
        attacked: Iterable[Attacked],
        clean: Ranks,
        setting: Setting,
        *,
        show: Iterable[Batch] | None,
    ) -> None:
        """A row, after its examples. show: the clean data as it was attacked, when examples are wanted."""
        row = evaluate(model, attacked, clean=clean, setting=setting, resamples=self.config.resamples)
        if show is not None:
            self.showcase.add(model, show, attacked, clean, setting)
        self.save(row)

    def save(self, row: Row) -> None:
        self.rows.add(row)
        if self.stop_asked():
            raise KeyboardInterrupt

    def batches(self, transform: ImageTransform) -> EvaluationBatches:
        """The data as a model wants it."""
        config = self.config
        return evaluation_batches(self.dataset, transform, batch_size=config.batch_size, workers=config.workers)

    def setting(
        self, surrogate: str, *, victim: str, seed: int, attack: str = "none", threat: Threat | None = None
    ) -> Setting:
        return Setting(
            surrogate=surrogate,
            victim=victim,
            defence=self.config.victims[victim].defence,
            attack=attack,
            threat=threat or Threat(),
            dataset=self.dataset.name,
            split=self.dataset.split,
            seed=seed,
        )
