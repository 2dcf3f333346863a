"""Measure the operators beside their opponents: rows are appended, plots drawn, targets compared.

fastmat bench ops
fastmat bench ops --device cpu --only pgd contrastive
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from fastmat.benchmarks.harness import QualityError
from fastmat.benchmarks.plot import write_plots
from fastmat.benchmarks.rows import read_rows
from fastmat.benchmarks.suite import BENCHES, run_cases
from fastmat.benchmarks.table import for_terminal, newest_runs, write_page
from fastmat.build import resolve_device
from fastmat.cli.common import Interrupted
from fastmat.cli.parser import Parser
from fastmat.errors import UserError, nearest

SUITES = ("ops",)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("suite", metavar="WHAT", help=f"what to measure: {', '.join(SUITES)}")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=BENCHES, help=f"some of {', '.join(BENCHES)}")
    parser.add_argument("--device", default="auto", help="auto (a GPU when there is one), cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--short", action="store_true", help="tiny shapes, in seconds: to see that everything runs")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder whose rows.jsonl grows (default: benchmarks/results/ops; runs/bench with --short)",
    )


def run(arguments: argparse.Namespace) -> None:
    for value, known, what in (
        (arguments.suite, SUITES, "no suite"),
        *((name, BENCHES, "--only: no bench") for name in arguments.only),
    ):
        if value not in known:
            raise UserError(f"{what} '{value}'{nearest(value, known)}")
    if arguments.threads < 1:
        raise UserError(f"--threads must be at least 1, got {arguments.threads}")
    device = resolve_device(arguments.device)
    out = arguments.out or Path("runs/bench" if arguments.short else "benchmarks/results/ops")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    rows_file = out / "rows.jsonl"
    before = len(read_rows(rows_file))  # a damaged file is found before an hour of work
    out.mkdir(parents=True, exist_ok=True)
    rows_file.touch()  # and so is a folder that takes no files
    torch.set_num_threads(arguments.threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for everybody
    refused: list[QualityError] = []
    try:
        for error in run_cases(
            tuple(dict.fromkeys(arguments.only)),
            device,
            short=arguments.short,
            rows_file=rows_file,
            command=command_of(arguments),
            tell=lambda title: print(f"measuring {title}", file=sys.stderr),
        ):
            refused.append(error)
            print(error, file=sys.stderr)
    except KeyboardInterrupt:
        show(out, before)
        raise Interrupted(f"the cases measured so far are in {rows_file}") from None
    show(out, before)
    if refused:
        raise UserError(f"{len(refused)} of the cases gave a wrong result and have no row: {refused[0]}")


def show(out: Path, before: int) -> None:
    """Plots and page of all rows; on the terminal those of this run."""
    rows = read_rows(out / "rows.jsonl")
    if rows:
        write_page(out, rows, write_plots(out, rows))
    if rows[before:]:
        print(for_terminal(newest_runs(rows[before:])))
        print(f"\n{out / 'README.md'}")


def command_of(arguments: argparse.Namespace) -> str:
    """The command that gives these rows again, without paths of this machine."""
    words = ["fastmat", "bench", arguments.suite, "--device", arguments.device]
    if tuple(arguments.only) != BENCHES:
        words += ["--only", *dict.fromkeys(arguments.only)]
    words += ["--threads", str(arguments.threads)] + ["--short"] * arguments.short
    return " ".join(words)
