"""Rows as text: a table for the terminal, and README.md beside the rows, both of the newest run of every attack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fastmat.benchmarks.attacks.rows import AttackRow
from fastmat.benchmarks.attacks.targets import TARGETS, AttackTarget
from fastmat.benchmarks.table import columns, markdown, number

AttackRun = tuple[AttackRow, ...]
HEADER = (
    "attack",
    "half",
    "implementation",
    "dtype",
    "pairs/s",
    "fastmat's speed",
    "texts/caption",
    "image fwd",
    "image bwd",
    "syncs/caption",
    "peak MB",
    "time: mlm/text/image/other %",
    "texts equal",
    "ASR",
)
GOALS = ("where", "attack", "ours", "asked", "measured", "met")


def where(row: AttackRow) -> str:
    """Rows of different places are never compared."""
    threads = "" if row.device != "cpu" else f", {row.threads} thread{'s' if row.threads > 1 else ''}"
    return f"{row.device}{threads}, {row.setting['model']} at {row.setting['side']} px, {row.setting['images']} images"


def newest_runs(rows: Iterable[AttackRow]) -> list[AttackRun]:
    """The rows of the newest run of every attack and half in every place."""
    runs: dict[tuple[str, ...], list[AttackRow]] = {}
    for row in rows:
        own = runs.setdefault((where(row), row.machine, str(row.setting), row.attack, row.half), [])
        if own and row.time > own[0].time:
            own.clear()
        own.append(row)
    return [tuple(run) for run in runs.values()]


def speed_up(row: AttackRow, run: AttackRun) -> float | None:
    """How many times the speed of `row` fastmat has in the same run and, against a tuned loop, in the same dtype."""
    ours = next((other for other in run if other.kind == "fastmat" and other.dtype == row.dtype), None)
    return None if ours is None or row.kind == "fastmat" else row.p50 / ours.p50


def cells(row: AttackRow, run: AttackRun) -> tuple[str, ...]:
    ratio, pairs, images = speed_up(row, run), row.pairs, row.setting["images"]
    images = row.pairs if row.attack.startswith("pgd") else images
    assert isinstance(images, int)

    def per(key: str, of: int) -> str:
        return number(row.counts.get(key, 0) / of) if row.counts else ""

    shares = "/".join(f"{100 * share:.0f}" for share in row.shares.values())
    return (
        row.attack,
        row.half,
        row.implementation,
        row.dtype,
        number(row.per_second),
        "" if ratio is None else f"{number(ratio)}x",
        per("text_encodings", pairs),
        per("image_forwards", images),
        per("image_backwards", images),
        "" if row.syncs is None else number(row.syncs / pairs),
        "" if row.peak is None else f"{row.peak / 1e6:.0f}",
        shares,
        percent(row.quality, "agreement"),
        percent(row.quality, "asr", of=100),
    )


def percent(values: Mapping[str, float], key: str, of: int = 1) -> str:
    return f"{100 * values[key] / of:.1f} %" if key in values else ""


def target_lines(runs: Sequence[AttackRun], target: AttackTarget) -> list[tuple[str, ...]]:
    """One line per place where the whole attack was measured; one with dashes where there is none."""
    lines: list[tuple[str, ...]] = []
    for run in runs:
        if (run[0].device, run[0].attack, run[0].half) == (target.device, target.attack, "both"):
            figure = target.measured(run)
            if figure is not None:
                what = (where(run[0]), target.attack, target.dtype, target.asked())
                lines.append((*what, number(figure), target.verdict(run)))
    return lines or [(target.device, target.attack, target.dtype, target.asked(), "-", "-")]


def for_terminal(runs: Sequence[AttackRun]) -> str:
    """Both tables, in columns; a target without rows is left out."""
    goals = [line for target in TARGETS for line in target_lines(runs, target) if line[-1] != "-"]
    parts = [columns([HEADER, *(cells(row, run) for run in runs for row in run)])]
    if goals:
        parts.append(columns([GOALS, *goals]))
    return "\n\n".join(parts)


def page(rows: Sequence[AttackRow], plots: Sequence[str]) -> str:
    """README.md of a results folder: targets, plots, then every attack by place."""
    runs = newest_runs(rows)
    parts = [
        "# Attacks: speed, work and quality",
        "Written by `fastmat bench attacks` from [rows.jsonl](rows.jsonl), the newest run of every attack; do not "
        "edit. All implementations ran in turn in one process; published: the original's loop written plainly, in fp32 "
        "with its quirks; tuned: the same algorithm with frozen weights and batches; original: a checkout of the "
        "original code in its own process. fp32 is without TF32. fastmat runs with the published quirks, so that texts "
        "can be equal, and computes the language model's candidates anew in every call. Before any figure, all were "
        "handed the same start and noise: in fp32 texts had to be equal wherever the published choice was clear and "
        "the final objective within 1 % (or two standard errors of what rounding scatters), in bf16 98 % of the texts "
        "and the success rate within half a point (or one caption, one query). Pairs/s from the median round. "
        "texts/caption, image fwd and bwd (per image): encoder rows counted by hooks. Syncs: on a GPU what CUDA warns "
        "of, on the CPU reads of tensors by Python, each of which would be one. The attack alone: the evaluation of "
        "the originals encodes the adversarial text and image once more. ASR: R@1 queries of the batch, both "
        "directions, right before and wrong after.",
        "## Targets",
        markdown([GOALS, *(line for target in TARGETS for line in target_lines(runs, target))]),
        *(f"![Speed-up of fastmat over each opponent]({plot})" for plot in plots),
    ]
    for place in dict.fromkeys((where(run[0]), run[0].machine) for run in runs):
        own = [run for run in runs if (where(run[0]), run[0].machine) == place]
        parts += [f"## {place[1]} ({place[0]})", provenance(own)]
        parts.append(markdown([HEADER, *(cells(row, run) for run in own for row in run)]))
    return "\n\n".join(parts) + "\n"


def provenance(runs: Sequence[AttackRun]) -> str:
    """What was attacked, and commands, versions and commits behind it, each distinct one once."""
    first = [run[0] for run in runs]
    said = {
        "attacked": [", ".join(f"{name} {value}" for name, value in row.setting.items()) for row in first],
        "searched": list(filter(None, (searched(run) for run in runs))),
        "command": [f"`{row.command}`" for row in first],
        "versions": [", ".join(f"{name} {version}" for name, version in run[-1].versions.items()) for run in runs],
        "commit": [row.commit or "none" for row in first],
    }
    return "\n".join(f"- {key}: {'; '.join(dict.fromkeys(values))}" for key, values in said.items() if values)


def searched(run: AttackRun) -> str:
    """What the published loop found of the captions: with random weights these are not representative."""
    quality = next((row.quality for row in run if "words_tried" in row.quality), None)
    if quality is None:
        return ""
    return (
        f"{run[0].attack} ({run[0].half}): {quality['words']:.1f} words a caption, {quality['words_tried']:.2f} tried, "
        f"{quality['candidates']:.1f} texts each"
    )


def write_page(folder: Path, rows: Sequence[AttackRow], plots: Sequence[str]) -> None:
    (folder / "README.md").write_text(page(rows, plots), encoding="utf-8")
