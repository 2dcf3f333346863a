"""Results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from fastmat.evaluation.results import Row, Threat, UnderTruth

HEADER = ("victim", "defence", "attack", "eps", "words", "TR@1", "IR@1", "ASR TR@1", "ASR IR@1")
UNDER = ("victim", "attack", "eps", "ground truth", "TR@1", "IR@1", "TR mAP@R", "IR mAP@R", "ASR TR@1", "ASR IR@1")
METRICS = ("tr@1", "ir@1", "tr_map@r", "ir_map@r")


def table(rows: Sequence[Row]) -> str:
    """One line per row, in percent; recalls at 1 with their 95 % interval. A budget that was not touched is a dash."""
    shown = aligned([HEADER, *(cells(row) for row in rows)])
    judged = [under(row, label, found) for row in rows for label, found in row.truths.items()]
    if judged:
        shown += ["", *aligned([UNDER, *judged])]
    if any(row.white_box and row.attack != "none" for row in rows):
        shown.append("* white box: through the victim's own weights")
    return "\n".join(shown)


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def under(row: Row, label: str, found: UnderTruth) -> tuple[str, ...]:
    """A row's figures under one ground truth."""
    values = (interval(found.metrics[metric], found.ci.get(metric)) for metric in METRICS)
    rates = (percent(found.metrics[metric]) for metric in ("asr_tr@1", "asr_ir@1"))
    return cells(row)[0], attack(row), budget(row)[0], label, *values, *rates


def cells(row: Row) -> tuple[str, ...]:
    return (
        row.victim if row.victim == row.surrogate else f"{row.victim} (from {row.surrogate})",
        row.defence,
        attack(row),
        *budget(row),
        *(with_interval(row, metric) for metric in ("tr@1", "ir@1")),
        *(percent(row.value(metric)) for metric in ("asr_tr@1", "asr_ir@1")),
    )


def budget(row: Row) -> tuple[str, str]:
    """Radius and words that the attack may have used, "none" for what keeps no budget."""
    if not row.threat.budgeted:
        return "none", "none"
    return (
        radius(row.threat) if row.max_distance else "-",
        str(row.threat.max_words) if row.max_words_changed else "-",
    )


def attack(row: Row) -> str:
    """A star marks the white box; some of the images, where not all were attacked."""
    name = row.attack if row.attack == "none" or not row.white_box else f"{row.attack} *"
    return name if row.gallery_images is None else f"{name} ({row.n_images:,} of {row.gallery_images:,} images)"


def radius(threat: Threat) -> str:
    return f"{threat.eps * 255:g}/255" if threat.norm == "linf" else f"{threat.eps:g} (l2)"


def with_interval(row: Row, metric: str) -> str:
    return interval(row.value(metric), row.ci[metric])


def interval(value: float | None, bounds: tuple[float, float] | None) -> str:
    return percent(value) if bounds is None else f"{percent(value)} [{bounds[0]:.1f}, {bounds[1]:.1f}]"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
