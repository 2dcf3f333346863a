"""Measure beside opponents: rows are appended, plots drawn, targets compared.

fastmat bench ops
fastmat bench ops --device cpu --only pgd contrastive
fastmat bench attacks --only sga --model FOLDER --mlm FOLDER --data test.json --images 16
fastmat bench attacks --only pgd --peer CHECKOUT --peer-python OTHER/bin/python
fastmat bench train --model ViT-B-16 --images 128 --device cuda
fastmat bench rerank --only albef
fastmat bench scaling
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastmat.benchmarks.attacks.names import NAMES
from fastmat.benchmarks.harness import QualityError
from fastmat.benchmarks.plot import write_plots
from fastmat.benchmarks.rerank.names import NAMES as RERANK
from fastmat.benchmarks.rows import read_rows
from fastmat.benchmarks.scaling.names import NAMES as SCALING
from fastmat.benchmarks.suite import BENCHES, run_cases
from fastmat.benchmarks.table import for_terminal, newest_runs, write_page
from fastmat.benchmarks.train.names import NAMES as TRAIN
from fastmat.build import resolve_device
from fastmat.cli.common import Interrupted
from fastmat.cli.parser import Parser
from fastmat.errors import UserError, nearest

if TYPE_CHECKING:
    from fastmat.benchmarks.attacks.setting import Choice

SUITES = {"ops": BENCHES, "attacks": NAMES, "train": TRAIN, "rerank": RERANK, "scaling": SCALING}
CHOSEN = ("model", "mlm", "data", "images")  # for whole attacks and training steps
PEER = ("peer", "peer_python")  # for attacks alone


def add_arguments(parser: Parser) -> None:
    parser.add_argument("suite", metavar="WHAT", help=f"what to measure: {', '.join(SUITES)}")
    known = "; ".join(f"{suite}: {', '.join(names)}" for suite, names in SUITES.items())
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of ({known})")
    parser.add_argument("--device", default="auto", help="auto (a GPU when there is one), cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--short", action="store_true", help="tiny shapes, in seconds: to see that everything runs")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder whose rows.jsonl grows (default: benchmarks/results/WHAT; runs/bench with --short)",
    )
    group = parser.add_argument_group("attacks and training steps")
    group.add_argument("--model", metavar="NAME", help="open_clip architecture (random weights) or folder")
    group.add_argument("--mlm", metavar="DIR", help="masked language model; without: a small random one")
    group.add_argument("--data", metavar="FILE", help="JSON list, pictures beside it; without: the digits set")
    group.add_argument("--images", type=int, metavar="N", help="images, 5 captions each; of a step: pairs (default: 8)")
    group = parser.add_argument_group("attacks")
    group.add_argument("--peer", type=Path, metavar="DIR", help="checkout of SGA, Co-Attack, torchattacks or RobustVLM")
    group.add_argument("--peer-python", metavar="FILE", help="Python that runs it (default: this one)")


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    device = resolve_device(arguments.device)
    place = "runs/bench" if arguments.short else f"benchmarks/results/{arguments.suite}"
    if arguments.short and arguments.suite != "ops":
        place += f"-{arguments.suite}"  # rows of another kind
    out = arguments.out or Path(place)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if arguments.suite == "attacks":
        from fastmat.benchmarks.attacks import command  # with transformers, which the operators do without

        known, show, measure = command.known_rows, command.show, measure_attacks
    elif arguments.suite == "train":
        from fastmat.benchmarks.train import command as train

        known, show, measure = train.known_rows, train.show, measure_train
    elif arguments.suite == "rerank":
        from fastmat.benchmarks.rerank import command as rerank

        known, show, measure = read_rows, rerank.show, measure_rerank
    elif arguments.suite == "scaling":
        from fastmat.benchmarks.scaling import command as scaling

        known, show, measure = scaling.known_rows, scaling.show, measure_scaling
    else:
        known, show, measure = read_rows, show_ops, measure_ops
    rows_file = out / "rows.jsonl"
    before = len(known(rows_file))  # a damaged file is found before an hour of work
    out.mkdir(parents=True, exist_ok=True)
    rows_file.touch()  # and so is a folder that takes no files
    torch.set_num_threads(arguments.threads)
    refused: list[QualityError] = []
    try:
        measure(arguments, device, rows_file, refused)
    except KeyboardInterrupt:
        show(out, before)
        raise Interrupted(f"the cases measured so far are in {rows_file}") from None
    show(out, before)
    if refused:
        raise UserError(f"{len(refused)} of the cases gave a wrong result and have no row: {refused[0]}")


def check(arguments: argparse.Namespace) -> None:
    """Raise UserError on what no suite knows, before anything is loaded."""
    suite = arguments.suite
    if suite not in SUITES:
        raise UserError(f"no suite '{suite}'{nearest(suite, SUITES)}")
    arguments.only = tuple(dict.fromkeys(arguments.only or SUITES[suite]))
    for name in arguments.only:
        if name not in SUITES[suite]:
            raise UserError(f"--only: no bench '{name}'{nearest(name, SUITES[suite])}")
    if arguments.threads < 1:
        raise UserError(f"--threads must be at least 1, got {arguments.threads}")
    if arguments.images is not None and arguments.images < 2:
        raise UserError(f"--images must be at least 2, got {arguments.images}: recall needs a second one")
    for names, suites in ((CHOSEN, ("attacks", "train")), (PEER, ("attacks",))):
        given = next((name for name in names if getattr(arguments, name) is not None), None)
        if suite not in suites and given is not None:
            homes = " and ".join(f"`fastmat bench {home}`" for home in suites)
            raise UserError(f"--{given.replace('_', '-')} belongs to {homes}")
    if arguments.peer is None and arguments.peer_python is not None:
        raise UserError("--peer-python needs --peer, the checkout that it shall run")
    if arguments.peer is not None and not arguments.peer.is_dir():
        raise UserError(f"--peer {arguments.peer} is no folder; give a checkout of the original code")


def measure_ops(
    arguments: argparse.Namespace, device: torch.device, rows_file: Path, refused: list[QualityError]
) -> None:
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for everybody
    for error in run_cases(
        arguments.only,
        device,
        short=arguments.short,
        rows_file=rows_file,
        command=command_of(arguments),
        tell=lambda title: print(f"measuring {title}", file=sys.stderr),
    ):
        refused.append(error)
        print(error, file=sys.stderr)


def measure_attacks(
    arguments: argparse.Namespace, device: torch.device, rows_file: Path, refused: list[QualityError]
) -> None:
    from fastmat.benchmarks.attacks import command

    request = command.Request(
        names=arguments.only,
        choice=choice_of(arguments),
        device=device,
        peer=arguments.peer,
        peer_python=arguments.peer_python or sys.executable,
        command=command_of(arguments),
    )
    without_tf32()
    command.measure_attacks(
        request, rows_file, tell=lambda title: print(f"measuring {title}", file=sys.stderr), refused=refused
    )


def measure_train(
    arguments: argparse.Namespace, device: torch.device, rows_file: Path, refused: list[QualityError]
) -> None:
    from fastmat.benchmarks.train import command

    without_tf32()
    command.measure_steps(
        arguments.only,
        choice_of(arguments),
        device,
        rows_file,
        command=command_of(arguments),
        tell=lambda title: print(f"measuring {title}", file=sys.stderr),
        refused=refused,
    )


def measure_rerank(
    arguments: argparse.Namespace, device: torch.device, rows_file: Path, refused: list[QualityError]
) -> None:
    from fastmat.benchmarks.rerank import command

    without_tf32()
    command.measure_models(
        arguments.only,
        device,
        rows_file,
        short=arguments.short,
        command=command_of(arguments),
        tell=lambda title: print(f"measuring {title}", file=sys.stderr),
        refused=refused,
    )


def choice_of(arguments: argparse.Namespace) -> Choice:
    from fastmat.benchmarks.attacks.setting import Choice

    return Choice(
        model=arguments.model,
        mlm=arguments.mlm,
        data=arguments.data,
        images=arguments.images or (2 if arguments.short else 8),
        short=arguments.short,
    )


def without_tf32() -> None:
    """fp32 is fp32: texts are to be equal."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def measure_scaling(
    arguments: argparse.Namespace, device: torch.device, rows_file: Path, refused: list[QualityError]
) -> None:
    from fastmat.benchmarks.scaling import command

    command.measure(
        arguments.only,
        rows_file,
        short=arguments.short,
        command=command_of(arguments),
        tell=lambda title: print(f"measuring {title}", file=sys.stderr),
    )


def show_ops(out: Path, before: int) -> None:
    """Plots and page of all rows; on the terminal those of this run."""
    rows = read_rows(out / "rows.jsonl")
    if rows:
        write_page(out, rows, write_plots(out, rows))
    if rows[before:]:
        print(for_terminal(newest_runs(rows[before:])))
        print(f"\n{out / 'README.md'}")


def command_of(arguments: argparse.Namespace) -> str:
    """The command that gives these rows again, without paths of this machine: of a path its last part."""
    words = ["fastmat", "bench", arguments.suite, "--device", arguments.device]
    if arguments.only != SUITES[arguments.suite]:
        words += ["--only", *arguments.only]
    words += ["--threads", str(arguments.threads)] + ["--short"] * arguments.short
    for name in CHOSEN:
        value = getattr(arguments, name)
        if value is not None:
            words += [f"--{name}", Path(value).name if isinstance(value, str) else str(value)]
    if arguments.peer is not None:
        words += ["--peer", arguments.peer.resolve().name]
    return " ".join(words)
