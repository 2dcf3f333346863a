"""Draw DIR/report.html again, of an evaluation, a task or a training run.

    fastmat report runs/eval
    fastmat report runs/mat

An evaluation is read from results.json and examples.json, a training run, also one that still goes
on, from its log.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from fastmat.cli.parser import Parser
from fastmat.cli.watching import told_to
from fastmat.errors import UserError
from fastmat.report.html import write_report
from fastmat.report.pipeline import write_pipeline_report
from fastmat.report.tasks import write_task_report
from fastmat.report.training import write_training_report

# By a key that results.json of that kind has alone; what has none of them is an evaluation.
WRITERS = {"task": write_task_report, "question": write_pipeline_report}


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="folder that `fastmat eval`, `task`, `quickstart` or `train` wrote"
    )


def run(arguments: argparse.Namespace) -> None:
    if not arguments.folder.is_dir():
        raise UserError(
            f"{arguments.folder} is no folder; name one that `fastmat eval`, `task`, `quickstart` or `train` wrote"
        )
    trained = not (arguments.folder / "results.json").exists() and (arguments.folder / "log.jsonl").exists()
    if trained:
        print(write_training_report(arguments.folder, about=told_to(arguments.folder)))
    else:
        print(writer_for(arguments.folder)(arguments.folder))


def writer_for(folder: Path) -> Callable[[Path], Path]:
    """Of what `folder/results.json` says it is; that it is whole is the writer's to find."""
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return write_report
    return next((write for key, write in WRITERS.items() if isinstance(found, dict) and key in found), write_report)
