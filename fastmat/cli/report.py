"""Draw DIR/report.html again from DIR/results.json and DIR/examples.json.

fastmat report runs/eval
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmat.cli.parser import Parser
from fastmat.errors import UserError
from fastmat.report.html import write_report


def add_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder that `fastmat eval` or `quickstart` wrote")


def run(arguments: argparse.Namespace) -> None:
    if not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder} is no folder; name one that `fastmat eval` or `fastmat quickstart` wrote")
    print(write_report(arguments.folder))
