"""The table, the plots and the page of the study of the contrastive weight."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fastmat.evaluation.results import write_atomic
from fastmat.report.labels import ATTACKS, DEFENCES
from fastmat.report.study import Rate, Section, Table, render_study
from fastmat.studies.itc_weight_answer import answer
from fastmat.studies.itc_weight_plots import Names, part_plots
from fastmat.studies.results import Line, StudyResults

TITLE = "The weight of the contrastive loss"
GUIDE = (
    "Models that differ in the ratio of two losses alone, trained from the same start with the sum of both weights "
    "held, then attacked through their own gradients and ranked. TR@1 and IR@1: recall at 1 of text and image "
    "retrieval. ITC ranks by cosine; ITM and ITM + cosine put its shortlist in order by the matching head. Survival: "
    "a right answer is on the shortlist still, which bounds recall after re-ranking; accuracy: of those that survive, "
    "the share that the scoring puts first. Drop: the share of the clean recall that is gone. A term of weight 0 is "
    "not trained: at 1:0 the matching head is the start's, at 0:1 the cosine follows an encoder that moves without it. "
    "In percent, each with a 95 % bootstrap interval over seeds and images."
)
PARTS = {"fusion": "A fusion model: contrast and matching (ITC:ITM)", "clip": "A dual encoder: contrast and distance"}
SCORINGS = {"itc": "ITC", "itm": "ITM", "itm+cosine": "ITM + cosine"}
OWN = {
    "itc": "attack on ITC",
    "itm": "attack on ITM",
    "joint": "attack on both",
    "fusion_kl": "attack on fusion (KL)",
    "feature": "attack on features",
}
COLUMNS = {"tr@1": "TR@1", "ir@1": "IR@1", "drop_tr@1": "drop of TR@1", "drop_ir@1": "drop of IR@1"}
STAGES = {
    "survival_tr": "TR survival",
    "accuracy_tr": "TR accuracy",
    "survival_ir": "IR survival",
    "accuracy_ir": "IR accuracy",
}


def write_study(out: Path, results: StudyResults) -> None:
    """results.json, README.md, report.html and the plots, each whole or not at all."""
    plots: dict[str, tuple[str, str]] = {}
    sections = []
    for part in dict.fromkeys(line.part for line in results.lines):
        own = [line for line in results.lines if line.part == part]
        drawn = part_plots(own, names=NAMES)
        plots |= {f"{part}-{name}": plot for name, plot in drawn.items()}
        sections.append(
            Section(title=PARTS[part], plots=[(svg, caption) for svg, caption in drawn.values()], tables=tables(own))
        )
    about = {"environment": results.environment, "config": results.config}
    found = answer(results.lines, adversarial=[*OWN, "sga"], scorings=SCORINGS, defences=DEFENCES)
    content = json.dumps(results.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(out / "results.json", content.encode())
    for name, (svg, _) in plots.items():
        write_atomic(out / f"{name}.svg", standalone(svg).encode())
    write_atomic(out / "README.md", page(results, sections, answer=found).encode())
    write_atomic(out / "report.html", render_study(TITLE, GUIDE, sections, about=about, answer=found).encode())


def standalone(svg: str) -> str:
    """The element as a file of its own."""
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def page(results: StudyResults, sections: Sequence[Section], *, answer: str) -> str:
    """README.md: the same answer and tables as the page's."""
    count = len(results.lines[0].by_seed)
    seeds = "1 seed" if count == 1 else f"{count} seeds"
    parts = [
        f"# {TITLE}",
        f"**{answer}**",
        GUIDE,
        f"{results.dataset}: {results.n_images} images, {results.n_captions} captions, {seeds}; "
        f"{results.environment['device']}, torch {results.environment['torch']}.",
    ]
    for section in sections:
        parts.append(f"## {section.title}")
        for table in section.tables:
            parts += [f"### {table.title}", table.markdown()]
    return "\n\n".join(parts) + "\n"


def name_of(attack: str) -> str:
    return "clean" if attack == "none" else OWN.get(attack) or ATTACKS.get(attack, attack)


NAMES: Names = {
    "attack": name_of,
    "defence": lambda name: DEFENCES.get(name, name),
    "scoring": lambda name: SCORINGS[name],
}


def tables(lines: Sequence[Line]) -> list[Table]:
    """For every defence and scoring, one line per attack and weight; and what each stage does."""
    made = []
    for defence in dict.fromkeys(line.defence for line in lines):
        for scoring in dict.fromkeys(line.scoring for line in lines):
            rows = [line for line in lines if (line.defence, line.scoring) == (defence, scoring)]
            title = f"{NAMES['defence'](defence)}, ranked by {SCORINGS[scoring]}"
            made.append(table(title, rows, COLUMNS))
            if scoring == "itm":
                made.append(table(f"{NAMES['defence'](defence)}, both stages of ITM", rows, STAGES))
    return made


def table(title: str, rows: Sequence[Line], columns: dict[str, str]) -> Table:
    attacks = dict.fromkeys(line.attack for line in rows)
    ordered = sorted(rows, key=lambda line: list(attacks).index(line.attack))
    return Table(
        title=title,
        header=["attack, weights", *columns.values()],
        lines=[
            (
                f"{name_of(line.attack)}, {line.weight}",
                [Rate.of(line.values.get(metric)) for metric in columns],
            )
            for line in ordered
        ],
    )
