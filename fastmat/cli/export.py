"""Write a trained model for open_clip or transformers, or an adversarial set as 8-bit PNG files.

    fastmat export runs/mat --out hardened --results runs/eval

The folder is loaded by the library that the model came from, unchanged, and holds a model card.
The checkpoint is the most robust one where the run was validated, else the last.

    fastmat export runs/sga --out runs/sga-png

The clean images are found again where the set was made of them; key=value names another place:

    fastmat export runs/sga --out runs/sga-png data.images=/elsewhere/images

Of a set, DIR/annotations.json with DIR as image folder is a `json` data set, for this program or
any other.
DIR/manifest.json says how far rounding moved every image.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

from fastmat.build import build_data
from fastmat.cli.common import check_out
from fastmat.cli.config import ExportConfig
from fastmat.cli.export_model import export_run, is_training_run
from fastmat.cli.keys import describe
from fastmat.cli.load import override, validate
from fastmat.cli.parser import Parser
from fastmat.data.loader import evaluation_batches
from fastmat.errors import UserError
from fastmat.evaluation.adversarial_set import AdversarialSet
from fastmat.evaluation.export import export_set
from fastmat.evaluation.manifest import Manifest
from fastmat.evaluation.subset import pick, picked
from fastmat.report.labels import radius


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "source", metavar="RUN_OR_SET", type=Path, help="folder of a training run or an adversarial set"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of a set: overrides, such as data.images=DIR")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="new folder for what is written")
    parser.add_argument("--checkpoint", metavar="NAME", help="of a run: best, last, or such as step-00000500")
    parser.add_argument("--results", metavar="DIR", type=Path, help="of a run: what `fastmat eval` wrote, for the card")
    parser.add_argument("--victim", metavar="LABEL", help="of a run: its label in --results, where weights do not tell")
    parser.keys = partial(describe, ExportConfig)


def run(arguments: argparse.Namespace) -> None:
    if is_training_run(arguments.source):
        export_model(arguments)
        return
    for option in ("checkpoint", "results", "victim"):
        if getattr(arguments, option) is not None:
            raise UserError(f"--{option} is for a training run, and {arguments.source} is none; leave it out")
    stored = AdversarialSet(arguments.source)
    made = stored.manifest
    values = source_of(made, arguments.source)
    for text in arguments.settings:
        override(values, text)
    config = validate(ExportConfig, values, source=str(arguments.source))
    check_out(arguments.out, resume=False, sign="manifest.json")
    dataset = build_data(config.data, limit=config.limit)
    rows = range(dataset.n_images) if config.rows is None else config.rows
    attacked = pick(dataset, rows)
    if attacked.fingerprint() != made.data:
        raise UserError(
            f"data: {dataset.name}/{dataset.split} is not what {arguments.source} was made of; name that data"
        )
    batches = evaluation_batches(dataset, made.image_transform, batch_size=config.batch_size, workers=config.workers)
    exported = export_set(stored, picked(batches, rows), arguments.out, ids=attacked.ids)
    norm = made.threat.norm
    if norm == "linf" and made.threat.eps * 255 < 1:
        print(f"the budget {radius(made.threat.eps, norm)} is less than one 8-bit level: no pixel can move")
    print(
        f"{len(exported.images)} images, at most {radius(exported.distance_8bit, norm)} from the clean ones (budget "
        f"{radius(made.threat.eps, norm)}, {norm}); rounding moved pixels by at most {exported.moved_max:.2f}/255, "
        f"{exported.moved_mean:.3f}/255 on average: {arguments.out}"
    )


def export_model(arguments: argparse.Namespace) -> None:
    if arguments.settings:
        raise UserError(
            f"'{arguments.settings[0]}' is for an adversarial set, and {arguments.source} is a training run"
        )
    check_out(arguments.out, resume=False, sign="README.md")
    library = export_run(
        arguments.source,
        arguments.out,
        which=arguments.checkpoint,
        results=arguments.results,
        victim=arguments.victim,
    )
    print(f"{library} loads it: {arguments.out}")


def source_of(made: Manifest, folder: Path) -> dict[str, Any]:
    """Where the clean images were; sets of earlier versions say it in their configuration."""
    if "task" in made.source:
        raise UserError(
            f"{folder} holds rows of a task, whose annotations an exported set would lack; judge it with `fastmat task`"
        )
    found = made.source or {key: made.config[key] for key in ("data", "limit") if key in made.config}
    return copy.deepcopy(found)
