"""`fastmat bench attacks` from its settings to rows, plots and page."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fastmat.benchmarks.attacks.memory import peak_here, peak_in_child
from fastmat.benchmarks.attacks.peer import Peer
from fastmat.benchmarks.attacks.plot import write_plots
from fastmat.benchmarks.attacks.rows import AttackRow
from fastmat.benchmarks.attacks.setting import Choice, prepare
from fastmat.benchmarks.attacks.suite import run_attacks
from fastmat.benchmarks.attacks.table import for_terminal, newest_runs, write_page
from fastmat.benchmarks.harness import QualityError
from fastmat.benchmarks.rows import read_rows_of


@dataclass(frozen=True, kw_only=True)
class Request:
    """names: attacks. peer: a checkout of an original and the Python that runs it."""

    names: tuple[str, ...]
    choice: Choice
    device: torch.device
    peer: Path | None
    peer_python: str
    command: str


def measure_attacks(
    request: Request, rows_file: Path, *, tell: Callable[[str], None], refused: list[QualityError]
) -> None:
    """Appends rows attack by attack; what the gate refuses goes to `refused`."""
    choice, device = request.choice, request.device
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        setting = prepare(choice, Path(folder), device)
        peer = None
        if request.peer is not None:
            peer = stack.enter_context(
                Peer(checkout=request.peer, python=request.peer_python, setting=setting, folder=Path(folder) / "peer")
            )
        here = device.type == "cuda"
        memory = partial(peak_here, setting) if here else partial(peak_in_child, choice)
        for error in run_attacks(
            setting,
            request.names,
            short=choice.short,
            rows_file=rows_file,
            command=request.command,
            memory=None if choice.short else memory,
            peer=peer,
            tell=tell,
        ):
            refused.append(error)
            tell(str(error))


def known_rows(rows_file: Path) -> Sequence[AttackRow]:
    return read_rows_of(AttackRow, rows_file)


def show(out: Path, before: int) -> None:
    """Plots and page of all rows; on the terminal those of this run."""
    rows = known_rows(out / "rows.jsonl")
    if rows:
        write_page(out, rows, write_plots(out, rows))
    if rows[before:]:
        print(for_terminal(newest_runs(rows[before:])))
        print(f"\n{out / 'README.md'}")
