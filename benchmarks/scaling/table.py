"""README.md of the results: predictions for MAT and the other methods, and real processes beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastmat.benchmarks.scaling.cluster import H200
from fastmat.benchmarks.scaling.observe import Observed
from fastmat.benchmarks.scaling.predict import Setup, efficiency, predict, setups
from fastmat.benchmarks.scaling.shapes import MODELS
from fastmat.benchmarks.table import columns, markdown, number

Lines = list[tuple[str, ...]]
HERE = Path(__file__).resolve().parent
PREDICTED = (
    "model", "strategy", "GPUs", "pairs/GPU", "TFLOP", "state GB", "activations GB", "sent MB", "collectives",
    "step ms", "pairs/s/GPU", "efficiency", "without overlap", "pairs that fit",
)  # fmt: skip
SEEN = (
    "strategy", "processes", "all-reduce MB", "all-gather MB", "reduce-scatter MB", "on the wire MB", "predicted MB",
    "ms a step", "over 1 process", "predicted",
)  # fmt: skip


def newest(rows: Iterable[Observed]) -> list[Observed]:
    """The last row of every strategy and number of processes."""
    return list({(row.strategy, row.processes): row for row in rows}.values())


def predicted_line(setup: Setup, name: str) -> tuple[str, ...]:
    found = predict(setup)
    return (
        MODELS[setup.model].name,
        name,
        str(setup.gpus),
        str(setup.batch),
        number(found.flops.total / 1e12),
        number(found.memory.state / 1e9),
        number(max(found.memory.inner, found.memory.outer) / 1e9),
        number(found.sent / 1e6),
        str(found.calls),
        number((found.step) * 1e3),
        number(setup.batch / found.step),
        f"{efficiency(setup):.3f}",
        f"{efficiency(setup, serial=True):.3f}",
        str(found.pairs_that_fit(setup)),
    )


def mat_lines() -> Lines:
    chosen = [one for one in setups() if one.method == "mat" and not one.checkpointing and not one.micro_batch]
    return [PREDICTED, *(predicted_line(one, one.strategy) for one in chosen)]


def method_lines() -> Lines:
    """Methods beside MAT on one GPU, and MAT's ways to need less memory."""
    lines = []
    for one in setups():
        if one.gpus == 1 and one.strategy == "ddp":
            saver = ", checkpointing" * one.checkpointing
            saver += f", micro-batches of {one.micro_batch}" if one.micro_batch else ""
            lines.append(predicted_line(one, one.method + saver))
    return [("model", "method", *PREDICTED[2:]), *lines]


def seen_lines(rows: Sequence[Observed]) -> Lines:
    """Bytes carried, with what was predicted where it differs by more than 0.1 %; times over the one-process step."""
    alone = {row.strategy: row.seconds for row in rows if row.processes == 1}
    lines: Lines = [SEEN]
    for row in rows:
        carried = [pair(row, kind) for kind in ("all_reduce", "all_gather", "reduce_scatter")]
        over = alone.get(row.strategy)
        lines.append(
            (
                row.strategy,
                str(row.processes),
                *carried,
                "-" if row.crossed is None else number(row.crossed / 1e6),
                number(row.crossing / 1e6),
                number(row.seconds * 1e3),
                "-" if over is None else f"{row.seconds / over:.2f}",
                f"{max(1.0, row.processes / row.cores):.2f} or more",
            )
        )
    return lines


def pair(row: Observed, kind: str) -> str:
    """ "22.1", or "22.1 (not 11.1)"; one process moves nothing, whatever it calls."""
    seen, expected = row.carried.get(kind, 0), row.expected.get(kind, 0)
    if row.processes == 1:
        return "-"
    agrees = abs(seen - expected) <= max(64, 1e-3 * expected)
    return megabytes(seen) if agrees else f"{megabytes(seen)} (not {megabytes(expected)})"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.3f}" if size else "0"


def for_terminal(rows: Sequence[Observed]) -> str:
    parts = [columns(mat_lines())]
    if rows:
        parts.append(columns(seen_lines(rows)))
    return "\n\n".join(parts)


def write_page(folder: Path, rows: Sequence[Observed], plot: str) -> None:
    share = f"{H200.achievable:.0%} of {H200.peak / 1e12:g} TFLOP/s"
    link = os.path.relpath(HERE / "README.md", folder.resolve()) if inside_checkout(folder) else ""
    source = f"[how each figure is derived]({link})" if link else "benchmarks/scaling/README.md says how"
    parts = [
        "# What a training step costs, on 1 to 512 GPUs",
        f"Written by `fastmat bench scaling`; do not edit. Predictions ([predicted.jsonl](predicted.jsonl)): {source}. "
        f"Nothing in the first two tables is measured. {H200.name}: {share}; {H200.link / 1e9:g} GB/s in a node, "
        f"{H200.network / 1e9:g} GB/s per GPU between nodes, {H200.moved:.0%} of either. Per GPU and step: TFLOP, "
        "fp32 weights, gradients and optimiser states (state), activations in bf16, bytes sent. Efficiency: speed per "
        "GPU over that of one, the batch per GPU being the same, with collectives behind the computing and, as the "
        "bound from the other side, with none.",
        f"![Efficiency of MAT, and memory of its state, by GPUs and strategy]({plot})",
        "## MAT",
        markdown(mat_lines()),
        "## Methods, and MAT in less memory, on one GPU",
        markdown(method_lines()),
    ]
    if rows:
        first = rows[0]
        parts += [
            "## Real processes",
            f"MAT steps of a small CLIP over gloo ([rows.jsonl](rows.jsonl)), {first.machine}, {first.cores} cores, "
            f"torch {first.versions['torch']}, DeepSpeed {first.versions['deepspeed']}: `{first.command}`. Bytes of "
            "the whole tensors by collective are as predicted, to 0.1 %, where no second number stands. On the wire: "
            "all bytes that crossed the loopback of a network of their own, TCP's included; predicted: the ring's, "
            "with gloo's reduce-scatter, which is an all-reduce. Times tell little here: processes share the cores, "
            "with gloo's copying and with other work that slows one process as well, so a ratio below the floor that "
            "idle cores would set says that the machine was busy; seconds are confirmed by nothing here.",
            markdown(seen_lines(rows)),
        ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def inside_checkout(folder: Path) -> bool:
    return HERE.parent in folder.resolve().parents
