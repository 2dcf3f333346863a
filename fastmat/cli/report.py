"""Draw DIR/report.html again, of an evaluation, a task or a training run.

    fastmat report runs/eval
    fastmat report runs/mat

An evaluation is read from results.json and examples.json, a training run, also one that still goes
on, from its log.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmat.cli.parser import Parser
from fastmat.cli.watching import told_to
from fastmat.errors import UserError
from fastmat.report.html import write_report
from fastmat.report.pipeline import is_pipeline_results, write_pipeline_report
from fastmat.report.tasks import is_task_results, write_task_report
from fastmat.report.training import write_training_report


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
    elif is_task_results(arguments.folder):
        print(write_task_report(arguments.folder))
    elif is_pipeline_results(arguments.folder):
        print(write_pipeline_report(arguments.folder))
    else:
        print(write_report(arguments.folder))
