"""The main job on data that needs no download: attack a small model, harden it, evaluate, report.

Scenes of handwritten digits with captions. A masked language model and a dual encoder are trained
on them; the encoder is fine-tuned and hardened by each defence, from the same weights and for the
same number of outer steps; all are attacked on the test split, at a radius chosen on the validation
split. Minutes on two cores.

    fastmat quickstart --out runs/quickstart

Writes results.json and report.html, and a folder with log and weights for every training run.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from fastmat.build import DATASETS, build_data, build_threat, parse
from fastmat.cli.common import check_out, going_on
from fastmat.cli.config import EvalConfig, QuickstartConfig, TrainConfig
from fastmat.cli.eval import evaluate_models
from fastmat.cli.keys import describe
from fastmat.cli.load import override, plain, put, read_yaml, validate
from fastmat.cli.parser import Parser
from fastmat.cli.table import table
from fastmat.cli.train import train_model
from fastmat.errors import UserError
from fastmat.evaluation.results import Results, TrainingPoint, write_atomic, write_results
from fastmat.report.html import write_report
from fastmat.training.checkpoint import checkpoints
from fastmat.training.mlm import train_mlm

CONFIG = "quickstart"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="overrides")
    parser.add_argument("--config", metavar="NAME_OR_PATH", default=CONFIG, help="default: %(default)s")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("quickstart"), help="default: %(default)s")
    parser.add_argument("--short", action="store_true", help="fewer steps and images: shows that it runs, no more")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    parser.keys = partial(describe, QuickstartConfig)


def run(arguments: argparse.Namespace) -> None:
    values = read_yaml(arguments.config)
    for key, value in values.get("short", {}).items() if arguments.short else ():
        put(values, key, value)
    for text in arguments.settings:
        override(values, text)
    config = validate(QuickstartConfig, values, source=arguments.config)
    check_out(arguments.out, resume=arguments.resume, sign="config.json")
    with going_on(arguments.out):
        results, eps = Quickstart(config, arguments.out).run()
        print(f"\neps = {eps * 255:g}/255, chosen on the validation split\n\n{table(results.rows)}\n")
        print(arguments.out / "report.html")


class Quickstart:
    """The stages, each in its folder of `out`; a finished stage is not run again.

    Raises UserError when `out` was begun with another config.
    """

    def __init__(self, config: QuickstartConfig, out: Path) -> None:
        for label, known in ((config.choose_by, config.attacks), (config.choose_on, config.harden.defences)):
            if label not in known:
                raise UserError(f"'{label}', which chooses eps, is not one of {', '.join(known)}")
        for key, radii in (("choose_eps", config.choose_eps), ("curve", config.curve)):
            for eps in radii:
                build_threat({**config.threat, "eps": eps}, where=key)  # at once, not after the training
        self.config = config
        self.out = out
        begun = json.dumps(plain(config), indent=1).encode()
        file = out / "config.json"
        if file.exists() and file.read_bytes() != begun:
            raise UserError(f"{out} was begun with another config; repeat that one, or name a new folder")
        write_atomic(file, begun)

    def run(self) -> tuple[Results, float]:
        """The results on the test split, and the radius chosen for them."""
        config = self.config
        captions = [
            caption for own in build_data(parse(self.data("train"), DATASETS, where="data")).captions for caption in own
        ]
        words = sorted({word for caption in captions for word in caption.lower().split()})
        start = {**config.model.plain(), "vocabulary": words}

        say("masked language model")
        if not (self.out / "mlm").exists():
            train_mlm(captions, self.out / "mlm", seed=config.seed, steps=config.mlm_steps)
        say("dual encoder from random weights")
        self.train("start", "finetune", start, config.pretrain, eps=0.0)
        pretrained = {**start, "weights": str(self.out / "start" / "model.safetensors")}

        defences = dict(config.harden.defences)
        say(config.choose_on)
        self.train(config.choose_on, defences.pop(config.choose_on), pretrained, config.harden.train, eps=0.0)
        say("eps, on the validation split")
        eps = self.choose_eps(start)
        for label, defence in defences.items():
            say(f"{label} at eps {eps * 255:g}/255")
            self.train(label, defence, pretrained, config.harden.train, eps=eps)

        say("attacks on the test split")
        results = evaluate_models(
            self.evaluation(
                start,
                labels=list(config.harden.defences),
                split="test",
                limit=config.test_images,
                attacks=list(config.attacks),
                radii=[eps, *config.curve],
            ),
            self.out,
            resume=True,
        )
        training = {label: training_points(self.out / label / "log.jsonl") for label in config.harden.defences}
        results = results.model_copy(
            update={"training": training, "config": {**results.config, "quickstart": plain(config)}}
        )
        write_results(self.out, results)
        write_report(self.out)
        return results, eps

    def train(self, label: str, defence: Any, model: dict[str, Any], settings: dict[str, Any], *, eps: float) -> None:
        """Train `model` by `defence` in the folder `label`; continues there if it was interrupted."""
        folder = self.out / label
        if (folder / "model.safetensors").exists():
            return
        resume = bool(checkpoints(folder / "checkpoints"))
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        values = {
            "model": model,
            "data": self.data("train"),
            "defence": defence,
            "mlm": str(self.out / "mlm"),
            "threat": {**self.config.threat, "eps": eps},
            "train": settings,
            "batch_size": self.config.batch_size,
            "captions_per_image": self.config.captions_per_image,
            "seed": self.config.seed,
        }
        train_model(validate(TrainConfig, values, source=CONFIG), folder, resume=resume)

    def choose_eps(self, model: dict[str, Any]) -> float:
        """The first radius at which the attack brings validation TR@1 low enough, or the last one."""
        config = self.config
        evaluation = self.evaluation(
            model,
            labels=[config.choose_on],
            split="val",
            limit=config.validation_images,
            attacks=[config.choose_by],
            radii=list(config.choose_eps),
        )
        rows = evaluate_models(evaluation, self.out / "validation", resume=True).rows
        tr_at_1 = {row.threat.eps: row.value("tr@1") for row in rows if row.attack == config.choose_by}
        low_enough = [eps for eps in config.choose_eps if (tr_at_1.get(eps) or 0.0) <= config.broken_below]
        return low_enough[0] if low_enough else config.choose_eps[-1]

    def evaluation(
        self,
        model: dict[str, Any],
        *,
        labels: list[str],
        split: str,
        limit: int | None,
        attacks: list[str],
        radii: list[float],
    ) -> EvalConfig:
        config = self.config
        values = {
            "victims": {
                label: {
                    "model": {**model, "weights": str(self.out / label / "model.safetensors")},
                    "defence": config.harden.defences[label].name,
                }
                for label in labels
            },
            "data": self.data(split),
            "mlm": str(self.out / "mlm"),
            "threat": {**config.threat, "eps": radii[0]},
            "eps": radii[1:],
            "attacks": {label: config.attacks[label] for label in attacks},
            "seed": config.seed,
            "batch_size": config.batch_size,
            "limit": limit,
            "examples": config.examples,
        }
        return validate(EvalConfig, values, source=CONFIG)

    def data(self, split: str) -> dict[str, Any]:
        return {"name": "digits", "split": split, "seed": self.config.seed}


def training_points(log: Path) -> list[TrainingPoint]:
    """The loss curve that a training run wrote."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [TrainingPoint(**{key: line[key] for key in TrainingPoint.model_fields}) for line in lines if line["loss"]]


def say(stage: str) -> None:
    print(f"- {stage}", flush=True)
