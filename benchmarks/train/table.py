"""Rows as text: a table for the terminal, and README.md beside the rows, both of the newest run of every step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastmat.benchmarks.attacks.table import newest_runs, percent, provenance, target_lines, where
from fastmat.benchmarks.table import columns, markdown, number
from fastmat.benchmarks.train.rows import TrainRow
from fastmat.benchmarks.train.targets import TARGETS

TrainRun = tuple[TrainRow, ...]
HEADER = (
    "step",
    "who",
    "dtype",
    "pairs/s",
    "fastmat's speed",
    "time: text/image/outer/loading %",
    "floor %",
    "image fwd",
    "image bwd",
    "texts/pair",
    "texts bwd",
    "syncs",
    "peak MB",
    "texts equal",
    "loss off",
    "gradient off",
)
GOALS = ("where", "step", "ours", "asked", "measured", "met")


def cells(row: TrainRow, run: TrainRun) -> tuple[str, ...]:
    def per_pair(key: str) -> str:
        return number(row.counts.get(key, 0) / row.pairs)

    ours = {"published": "fastmat", "tuned": "fastmat", "plain finetune": "finetune"}.get(row.kind)
    same = next((other for other in run if (other.kind, other.dtype) == (ours, row.dtype)), None)
    return (
        row.attack,
        row.kind,
        row.dtype,
        number(row.per_second),
        "" if same is None else f"{number(row.p50 / same.p50)}x",
        "/".join(f"{100 * share:.0f}" for share in row.shares.values()),
        "" if row.utilisation is None else f"{100 * row.utilisation:.0f}",
        per_pair("image_forwards"),
        per_pair("image_backwards"),
        per_pair("text_encodings"),
        per_pair("text_backwards"),
        "" if row.syncs is None else str(row.syncs),
        "" if row.peak is None else f"{row.peak / 1e6:.0f}",
        percent(row.quality, "agreement"),
        percent(row.quality, "loss_off"),
        percent(row.quality, "gradient_off"),
    )


def goals(runs: Sequence[TrainRun]) -> list[tuple[str, ...]]:
    return [line for target in TARGETS for line in target_lines(runs, target)]


def for_terminal(runs: Sequence[TrainRun]) -> str:
    """Both tables, in columns; a target without rows is left out."""
    met = [line for line in goals(runs) if line[-1] != "-"]
    parts = [columns([HEADER, *(cells(row, run) for run in runs for row in run)])]
    return "\n\n".join([*parts, *([columns([GOALS, *met])] if met else [])])


def page(rows: Sequence[TrainRow], plots: Sequence[str]) -> str:
    """README.md of a results folder: targets, plots, then every step by place."""
    runs = newest_runs(rows)
    parts = [
        "# Training steps: speed, work and memory",
        "Written by `fastmat bench train` from [rows.jsonl](rows.jsonl), the newest run of every step; do not edit. "
        "One device; a step is loading, attack, outer forward and backward, and the update, at learning rate 0. All "
        "contestants took their steps in turn in one process. published: the original's loop written plainly; "
        "tuned: the same algorithm with frozen weights, batches, the fused update and no needless waits; finetune: "
        "fastmat's step without an attack. fp32 is without TF32. fastmat's text attack runs with the published quirks, "
        "so that texts can be equal, and finds the language model's candidates on the disk, as every epoch after the "
        "first does. Before any figure, all were handed the same weights, batch and draws: in fp32 texts had to be "
        "equal wherever the published choice was clear, and the images, which rounding alone makes differ after some "
        "sign steps, had to reach the published loss to 1 % (or two standard errors); loss and gradient of the update "
        "had to be those of the plain loop at the same images and texts, to a thousandth. In 16 bits 98 % of the "
        "texts, and the loss reached to 5 %. Pairs/s "
        "from the median step. floor: the share of the time that the FLOPs of fastmat's step need at the rate of a "
        "large matrix product on the same machine, in the same dtype. fwd, bwd, texts: encoder rows per pair, "
        "counted by hooks. syncs: of a step; on a GPU what CUDA warns of, on the CPU reads of tensors by Python, "
        "AdamW's of its step counts among them. peak: above model, optimiser and batch.",
        "## Targets",
        markdown([GOALS, *goals(runs)]),
        *(f"![Milliseconds per pair by part]({plot})" for plot in plots),
    ]
    for place in dict.fromkeys((where(run[0]), run[0].machine) for run in runs):
        own = [run for run in runs if (where(run[0]), run[0].machine) == place]
        table = markdown([HEADER, *(cells(row, run) for run in own for row in run)])
        parts += [f"## {place[1]} ({place[0]})", provenance(own), table]
    return "\n\n".join(parts) + "\n"


def write_page(folder: Path, rows: Sequence[TrainRow], plots: Sequence[str]) -> None:
    (folder / "README.md").write_text(page(rows, plots), encoding="utf-8")
