"""Answer a question by many trained and attacked models; a table, plots and a page.

itc-weight         how the weight of the contrastive loss moves robustness
channel-alignment  whether correcting shifted features helps, and must depend on the input
test-time          what defences at test time claim, and what adaptive attacks leave of it

    fastmat study itc-weight --out runs/itc-weight
    fastmat study itc-weight --out runs/short --short

Writes results.json, README.md (the table), report.html and plots. With --resume, no finished cell
is computed again; whatever has other inputs than before is.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from fastmat.cli.common import check_out, going_on
from fastmat.cli.keys import describe
from fastmat.cli.load import override, put, read_yaml, validate
from fastmat.cli.parser import Parser
from fastmat.errors import UserError, nearest

# A study is a module above the commands that it is made of: `CONFIG`, the name of its config; `Config`, the schema;
# `run(config, out)`.
STUDIES = {
    "itc-weight": "fastmat.studies.itc_weight",
    "channel-alignment": "fastmat.studies.channel_alignment",
    "test-time": "fastmat.studies.test_time",
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("study", metavar="STUDY", help=f"one of {', '.join(STUDIES)}")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="overrides")
    parser.add_argument("--config", metavar="NAME_OR_PATH", help="default: the study's own, on built-in data")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="new folder for what is written")
    parser.add_argument("--short", action="store_true", help="next to no training: shows that it runs, no more")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    parser.keys = keys


def keys() -> str:
    return "\n\n".join(f"{name}:\n{describe(import_module(module).Config)}" for name, module in STUDIES.items())


def run(arguments: argparse.Namespace) -> None:
    if arguments.study not in STUDIES:
        raise UserError(f"no study '{arguments.study}'{nearest(arguments.study, STUDIES)}")
    study = import_module(STUDIES[arguments.study])
    source = arguments.config or study.CONFIG
    values = read_yaml(source)
    for key, value in values.get("short", {}).items() if arguments.short else ():
        put(values, key, value)
    for text in arguments.settings:
        override(values, text)
    config = validate(study.Config, values, source=source)
    check_out(arguments.out, resume=arguments.resume, sign="models")
    with going_on(arguments.out):
        study.run(config, arguments.out)
