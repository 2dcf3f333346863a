"""`fastmat bench scaling`: predictions written anew, real processes' rows appended, then page and plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from fastmat.benchmarks.rows import append_rows, read_rows_of
from fastmat.benchmarks.scaling.observe import Observed, observe
from fastmat.benchmarks.scaling.plot import write_plot
from fastmat.benchmarks.scaling.predict import efficiency, predict, setups
from fastmat.benchmarks.scaling.strategies import STRATEGIES
from fastmat.benchmarks.scaling.table import for_terminal, newest, write_page

PROCESSES = (1, 2, 4)


def measure(names: Sequence[str], rows_file: Path, *, short: bool, command: str, tell: Callable[[str], None]) -> None:
    """names: of `NAMES`. short: DDP alone, with one and two processes."""
    if "predicted" in names:
        write_predictions(rows_file.with_name("predicted.jsonl"))
    if "observed" in names:
        for strategy in ("ddp",) if short else STRATEGIES:
            for processes in PROCESSES[:2] if short else PROCESSES:
                tell(f"{strategy} with {processes} process{'es' if processes > 1 else ''}")
                append_rows(rows_file, [observe(strategy, processes, command=command)])


def write_predictions(path: Path) -> None:
    """The same lines for the same code: nothing of them is measured."""
    lines = []
    for setup in setups():
        found = predict(setup)
        line = {
            **dataclasses.asdict(setup),
            **dataclasses.asdict(found),
            "step": found.step,
            "serial": found.serial,
            "pairs_per_s_per_gpu": setup.batch / found.step,
            "pairs_that_fit": found.pairs_that_fit(setup),
            "efficiency": efficiency(setup),
            "efficiency_serial": efficiency(setup, serial=True),
        }
        lines.append(json.dumps(line, default=str) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def known_rows(rows_file: Path) -> Sequence[Observed]:
    return read_rows_of(Observed, rows_file)


def show(out: Path, before: int) -> None:
    """Page and plot of all rows; on the terminal the predictions, and what this run observed."""
    rows = known_rows(out / "rows.jsonl")
    write_page(out, newest(rows), write_plot(out))
    print(for_terminal(newest(rows[before:])))
    print(f"\n{out / 'README.md'}")
