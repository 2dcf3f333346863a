"""The tables, the plots and the page of the study of test-time defences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fastmat.evaluation.results import write_atomic
from fastmat.report.labels import ATTACKS
from fastmat.report.study import Rate, Section, Table, render_study
from fastmat.studies.itc_weight_report import standalone
from fastmat.studies.test_time_plots import roc_plot, verdict_plot
from fastmat.studies.test_time_results import Detection, Estimate, Line, TestTimeResults, Verdict
from fastmat.studies.test_time_verdicts import guard_name

TITLE = "Test-time defences, honestly attacked"
MADE = {"": "", "bare": "made on the bare model", "guard": "made through the guard"}
COLUMNS = {"tr@1": "TR@1", "ir@1": "IR@1", "tr@10": "TR@10", "ir@10": "IR@10"}


def guide(results: TestTimeResults) -> str:
    metric = f"R@{results.at}, the mean of TR@{results.at} and IR@{results.at}"
    return (
        "A guard changes images before a model encodes them. Claimed: what is left when the attack was made on the "
        "bare model, and the guard stands before it afterwards. Adaptive: what is left when the attack knows the "
        "guard, goes through it with gradients where there are any and averages over its draws, or is one of those on "
        f"the bare model; of several attacks the one that leaves least. Verdicts go by {metric}; a gain is the paired "
        "difference to the bare model under its own strongest attack, and an interval that holds 0 is no gain. Images "
        "alone are attacked, since an attack on words goes past every guard. What an attack leaves bounds what there "
        "is from above: a stronger one may leave less. In percent, each with a 95 % bootstrap interval over images; "
        "one seed."
    )


def write_study(out: Path, results: TestTimeResults) -> None:
    """results.json, README.md, report.html and the plots, each whole or not at all."""
    plots: dict[str, tuple[str, str]] = {}
    sections = []
    for model in dict.fromkeys(line.model for line in results.lines):
        drawn = plots_of(model, results)
        plots |= {f"{model}-{name}": plot for name, plot in drawn.items()}
        sections.append(Section(title=model, plots=list(drawn.values()), tables=tables_of(model, results)))
    content = json.dumps(results.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(out / "results.json", content.encode())
    for name, (svg, _) in plots.items():
        write_atomic(out / f"{name}.svg", standalone(svg).encode())
    write_atomic(out / "README.md", page(results, sections, list(plots)).encode())
    about = {"environment": results.environment, "config": results.config}
    html = render_study(TITLE, guide(results), sections, about=about, answer=" ".join(results.answer))
    write_atomic(out / "report.html", html.encode())


def page(results: TestTimeResults, sections: Sequence[Section], plots: Sequence[str]) -> str:
    """README.md: the answer, then the same tables as the page's."""
    parts = [
        f"# {TITLE}",
        f"**{' '.join(results.answer)}**",
        guide(results),
        f"{results.dataset}: {results.n_images} images, {results.n_captions} captions; "
        f"{results.environment['device']}, torch {results.environment['torch']}.",
    ]
    for section in sections:
        parts.append(f"## {section.title}")
        own = [name for name in plots if name.startswith(f"{section.title}-")]
        parts += [f"![{caption}]({name}.svg)" for name, (_, caption) in zip(own, section.plots, strict=True)]
        for table in section.tables:
            parts += [f"### {table.title}", table.markdown()]
    return "\n\n".join(parts) + "\n"


def attack_name(name: str) -> str:
    """As a table shall say it; "pgd through frequency_masking" too."""
    attack, through, guard = name.partition(" through ")
    told = {"none": "clean", "evading_pgd": "PGD that evades the detector"}.get(attack) or ATTACKS.get(attack, attack)
    return f"{told} through {guard_name(guard)}" if through else told


def plots_of(model: str, results: TestTimeResults) -> dict[str, tuple[str, str]]:
    """Name to (SVG, what it shows)."""
    verdicts = [own for own in results.verdicts if own.model == model]
    metric = f"r@{results.at}"
    bare = [line.values[metric] for line in results.lines if (line.model, line.guard) == (model, "none")]
    clean, *broken = bare
    made = {
        "verdicts": (
            verdict_plot(verdicts, (clean, min(broken)), named=guard_name, at=results.at),
            f"{model}: clean, claimed and adaptive, by guard. Bars: 95 % intervals; dotted: the bare model under its "
            "own strongest attack.",
        )
    }
    detections = [own for own in results.detectors if own.model == model]
    if detections:
        made["roc"] = (
            # Of those that do not know of the detector, the first stands for all.
            roc_plot(detections[:1] + [own for own in detections[1:] if own.adaptive], named=attack_name),
            f"{model}: what its detector sees of an attack that does not know of it, and of those that do. Dotted: "
            "the threshold.",
        )
    return made


def tables_of(model: str, results: TestTimeResults) -> list[Table]:
    """Verdicts, every attack in full, and the detector."""
    verdicts = [own for own in results.verdicts if own.model == model]
    lines = [line for line in results.lines if line.model == model]
    made = [verdict_table(verdicts, at=results.at), attack_table(lines)]
    detections = [own for own in results.detectors if own.model == model]
    return [*made, detector_table(detections)] if detections else made


def verdict_table(verdicts: Sequence[Verdict], *, at: int) -> Table:
    def row(own: Verdict) -> list[Rate]:
        rates = [own.clean, own.claimed, own.adaptive]
        gains = map(gain_of, (own.claimed_gain, own.adaptive_gain))
        attack, comma, made = own.adaptive_by.partition(",")
        by = f"{attack_name(attack)}{comma}{made}"
        return [*map(Rate.of, rates), *gains, Rate(value=by), Rate(value=own.verdict)]

    header = ["guard", f"clean R@{at}", "claimed", "adaptive", "gain claimed", "gain adaptive", "strongest", "verdict"]
    return Table(title="Verdicts", header=header, lines=[(guard_name(own.guard), row(own)) for own in verdicts])


def gain_of(estimate: Estimate) -> Rate:
    """With a sign, as a gain has one."""
    gain, low, high = (f"{number + 0.0:+.1f}" for number in estimate)
    return Rate(value=gain, interval=f"{low} to {high}")


def attack_table(lines: Sequence[Line]) -> Table:
    def label(line: Line) -> str:
        draws = f" ({line.draws} draws)" if line.draws > 1 else ""
        made = f", {MADE[line.made]}{draws}" if line.made and line.guard != "none" else ""
        return f"{guard_name(line.guard)}: {attack_name(line.attack)}{made}"

    return Table(
        title="Every attack",
        header=["guard: attack", *COLUMNS.values()],
        lines=[(label(line), [Rate.of(line.values[metric]) for metric in COLUMNS]) for line in lines],
    )


def detector_table(detections: Sequence[Detection]) -> Table:
    return Table(
        title="The detector",
        header=["attacked by", "AUC", "attacked images flagged", "clean images flagged"],
        lines=[
            (attack_name(own.against), [Rate.of(rate) for rate in (own.auc, own.found, own.false_alarms)])
            for own in detections
        ],
    )
