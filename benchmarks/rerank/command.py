"""`fastmat bench rerank`: rows as the operators' are, and their page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from fastmat.benchmarks.harness import QualityError, measure
from fastmat.benchmarks.plot import write_plots
from fastmat.benchmarks.rerank.suite import TARGETS, cases
from fastmat.benchmarks.rows import Row, append_rows, read_rows
from fastmat.benchmarks.suite import HERE, LIBRARIES, commit_of, machine_of, row_of, versions_of
from fastmat.benchmarks.table import HEADER, cells, columns, markdown, newest_runs, place_of, provenance, target_lines

GOALS = ("device", "case", "asked", "measured", "met")


def measure_models(
    names: Sequence[str],
    device: torch.device,
    rows_file: Path,
    *,
    short: bool,
    command: str,
    tell: Callable[[str], None],
    refused: list[QualityError],
) -> None:
    """Appends rows case by case; what the gate refuses goes to `refused`."""
    versions = versions_of((*LIBRARIES, "transformers"))
    about = {"device": device.type, "machine": machine_of(device), "threads": torch.get_num_threads()}
    for name in names:
        for case in cases(name, device, short=short):
            tell(case.title)
            try:
                measured = measure(
                    case, device, seconds=0.0 if short else 10.0, min_rounds=1 if short else 3, child=lambda _: None
                )
            except QualityError as error:
                refused.append(error)
                tell(str(error))
                continue
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            common = about | {"time": now, "versions": versions, "commit": commit_of(HERE), "command": command}
            append_rows(rows_file, [row_of(case, one, **common) for one in measured])
            del measured  # its model, before the next case makes its own


def show(out: Path, before: int) -> None:
    """Plots and page of all rows; on the terminal those of this run."""
    rows = read_rows(out / "rows.jsonl")
    if rows:
        (out / "README.md").write_text(page(rows, write_plots(out, rows)), encoding="utf-8")
    if rows[before:]:
        runs = newest_runs(rows[before:])
        met = [line for target in TARGETS for line in target_lines(runs, target) if line[-1] != "-"]
        tables = [[HEADER, *(cells(row, run) for run in runs for row in run)], *([[GOALS, *met]] if met else [])]
        print("\n\n".join(map(columns, tables)))
        print(f"\n{out / 'README.md'}")


def page(rows: Sequence[Row], plots: Sequence[str]) -> str:
    """README.md of a results folder: targets, plots, then every case by machine."""
    runs = newest_runs(rows)
    parts = [
        "# Two-stage retrieval: speed of the second stage",
        "Written by `fastmat bench rerank` from [rows.jsonl](rows.jsonl), the newest run of every case; do not edit. "
        "Shortlists and matching scores in both directions, from encoded images and texts; 5 captions an image, of "
        "about 14 tokens; random weights in the published sizes at 384 px. published loop: query by query, an image's "
        "keys and values computed for every candidate, texts padded to 30 (BLIP 35), image tokens on the host; tuned "
        "loop: tokens on the device, keys shared by an image's own candidates, padding cut. All ran in turn in one "
        "process. Before any figure, scores had to be those of the published loop in fp32 to the error shown at most, "
        "and every rank one that such an error allows. fp32 is without TF32; with TF32, the published loop still is.",
        "## Targets",
        markdown([GOALS, *(line for target in TARGETS for line in target_lines(runs, target))]),
        *(f"![Speed-up of fastmat over each opponent]({plot})" for plot in plots),
    ]
    for place, machine in dict.fromkeys((place_of(run[0]), run[0].machine) for run in runs):
        own = [run for run in runs if (place_of(run[0]), run[0].machine) == (place, machine)]
        table = markdown([HEADER, *(cells(row, run) for run in own for row in run)])
        parts += [f"## {machine} ({place})", provenance(own), table]
    return "\n\n".join(parts) + "\n"
