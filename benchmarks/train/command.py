"""`fastmat bench train` from its settings to rows, plots and page."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from fastmat.benchmarks.attacks.setting import Choice, prepare
from fastmat.benchmarks.attacks.table import newest_runs
from fastmat.benchmarks.harness import QualityError
from fastmat.benchmarks.rows import append_rows, read_rows_of
from fastmat.benchmarks.suite import HERE, LIBRARIES, commit_of, machine_of, versions_of
from fastmat.benchmarks.train.memory import peak_here, peak_in_child
from fastmat.benchmarks.train.meter import Split
from fastmat.benchmarks.train.pairs import Pairs
from fastmat.benchmarks.train.plot import write_plots
from fastmat.benchmarks.train.rows import TrainRow
from fastmat.benchmarks.train.suite import job_of, measure, rows_of
from fastmat.benchmarks.train.table import for_terminal, write_page


def measure_steps(
    names: Sequence[str],
    choice: Choice,
    device: torch.device,
    rows_file: Path,
    *,
    command: str,
    tell: Callable[[str], None],
    refused: list[QualityError],
) -> None:
    """Appends rows step by step; what the gate refuses goes to `refused`."""
    about = {
        "device": device.type,
        "machine": machine_of(device),
        "threads": torch.get_num_threads(),
        "versions": versions_of((*LIBRARIES, "transformers", "accelerate")),
        "commit": commit_of(HERE),
        "command": command,
    }
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(choice, Path(folder), device)
        split = Split(device)
        pairs = Pairs(choice, setting.model, Path(folder) / "images", device)
        for name in names:
            tell(name)
            job = job_of(name, setting, split, pairs)
            memory = partial(peak_in_child, choice)
            if device.type == "cuda":
                memory = partial(peak_here, lambda _, job=job: job, setting)
            try:
                measured, wrong = measure(
                    job,
                    setting,
                    split,
                    seconds=0.0 if choice.short else 10.0,
                    min_rounds=1 if choice.short else 3,
                    memory=None if choice.short else memory,
                )
            except QualityError as error:
                measured, wrong = [], [error]
            if measured:
                now = datetime.now(UTC).isoformat(timespec="milliseconds")
                common = about | {"time": now, "setting": dict(setting.names)}
                append_rows(rows_file, list(rows_of(job, setting, measured, common)))
            refused += wrong
            for sentence in map(str, wrong):
                tell(sentence)


def known_rows(rows_file: Path) -> Sequence[TrainRow]:
    return read_rows_of(TrainRow, rows_file)


def show(out: Path, before: int) -> None:
    """Plots and page of all rows; on the terminal those of this run."""
    rows = known_rows(out / "rows.jsonl")
    if rows:
        write_page(out, rows, write_plots(out, rows))
    if rows[before:]:
        print(for_terminal(newest_runs(rows[before:])))
        print(f"\n{out / 'README.md'}")
