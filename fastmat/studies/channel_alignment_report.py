"""The tables, the plots and the page of the study of channel-wise correction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastmat.evaluation.results import write_atomic
from fastmat.report.labels import ATTACKS
from fastmat.report.study import Rate, Section, Table, render_study
from fastmat.studies.channel_alignment_answer import named
from fastmat.studies.channel_alignment_plots import channel_plot, layer_plot, recall_plot
from fastmat.studies.channel_alignment_results import AlignmentResults, Layer, Row
from fastmat.studies.itc_weight_report import standalone

TITLE = "Dynamic against static correction of what an attack does to features, channel by channel"
GUIDE = (
    "An attack moves features; a correction behind the projection, made of calibration pairs of the training split "
    "with the encoder frozen, shall move them back. Static corrections are one affine map per channel: mean shift, "
    "mean and variance, least squares, or a gate with a constant input, which is trained and has as many parameters as "
    "the dynamic gate, whose factors and shifts depend on the input. Controls: a map that is not diagonal (subspace); "
    "the gate looking at other images (shuffled); a random gate that moves features as far; an oracle that is told the "
    "clean features and takes out the shift along as many directions as it says, which no defence can do. "
    "What counts is an attack made through the correction (adaptive). Figures of attacks that do not know of it, 'made "
    "without it', stand beside them as a warning: they are no evidence of robustness. Worst: each query's worst rank "
    "over several attacks, made on whatever. R@1 and R@10: recall, mean of text and image "
    "retrieval; mean recall: of both. In percent with 95 % intervals over images and seeds, by bootstrap; that of R² "
    "is a jackknife."
)
WORST = ("worst", "all")
OWN = {"none": "clean", "worst": "worst on all images", "all": "worst of all"}
MADE_ON = {"": "", "corrected": "", "uncorrected": ", made without it", "other": ", of another model"}


def write_study(out: Path, results: AlignmentResults) -> None:
    """results.json, README.md, report.html and the plots, each whole or not at all."""
    plots = {
        "layers": (
            layer_plot(results.misalignment),
            "Where an attack moves features, layer by layer: the share of the squared shift that one constant vector "
            "explains (R², with its interval), and the mean shift of a channel in clean standard deviations.",
        ),
        "channels": (
            channel_plot(results.misalignment),
            "Every channel where a correction stands, sorted by its own shift of the mean under the attack.",
        ),
        "recall": (
            recall_plot(results.rows),
            "Mean recall with each correction, on one axis: hatched where the attack did not know of the correction, "
            "full where it went through it; the worst attack on all images, and dashed: clean, without a correction.",
        ),
    }
    plots = {name: plot for name, plot in plots.items() if plot[0]}
    drawn = {
        "What an attack does to features": ("layers", "channels"),
        "What that does to recall": ("recall",),
    }
    tables = {
        "What an attack does to features": [constant_table(results), *layer_tables(results.misalignment)],
        "What a correction does to features": [removed_table(results)] if results.removed else [],
        "What that does to recall": [*headline_tables(results), *recall_tables(results)],
        "The dynamic correction against every other one": [versus_table(results)] if results.versus else [],
    }
    sections = [
        Section(title=title, plots=[plots[name] for name in drawn.get(title, ()) if name in plots], tables=own)
        for title, own in tables.items()
        if own
    ]
    about = {"environment": results.environment, "config": results.config}
    content = json.dumps(results.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(out / "results.json", content.encode())
    for name, (svg, _) in plots.items():
        write_atomic(out / f"{name}.svg", standalone(svg).encode())
    pictures = {title: [name for name in names if name in plots] for title, names in drawn.items()}
    write_atomic(out / "README.md", page(results, sections, pictures).encode())
    write_atomic(
        out / "report.html", render_study(TITLE, GUIDE, sections, about=about, answer=" ".join(results.answer)).encode()
    )


def page(results: AlignmentResults, sections: Sequence[Section], pictures: Mapping[str, Sequence[str]]) -> str:
    """README.md: the same plots and tables as the page's. pictures: names of plots by section."""
    seeds = "1 seed" if results.seeds == 1 else f"{results.seeds} seeds"
    parts = [
        f"# {TITLE}",
        *(f"**{sentence}**" for sentence in results.answer),
        GUIDE,
        f"{results.dataset}: {results.n_images} images, {results.n_captions} captions; calibration: "
        f"{results.calibration.n_images} images of {results.calibration.dataset}; {seeds}; "
        f"{results.environment['device']}, torch {results.environment['torch']}. {worst_of(results)}",
    ]
    for section in sections:
        parts.append(f"## {section.title}")
        names = pictures.get(section.title, ())
        parts += [f"![{told}]({name}.svg)" for name, (_, told) in zip(names, section.plots, strict=True)]
        for table in section.tables:
            parts += [f"### {table.title}", table.markdown()]
    return "\n\n".join(parts) + "\n"


def worst_of(results: AlignmentResults) -> str:
    """Which attacks the worst is taken of."""
    partial = {*results.config["subset"], *results.config["only"]}
    found = dict.fromkeys((row.attack, row.made_on) for row in results.rows if row.correction != "none")
    names = [
        f"{attack_name(a)}{MADE_ON[on].replace(',', '')}" for a, on in found if a not in ("none", *WORST, *partial)
    ]
    return f"Worst on all images is over {', '.join(names)}; worst of all is over every attack of the tables."


def attack_name(label: str) -> str:
    """
    >>> attack_name("apgd_100"), attack_name("co_attack"), attack_name("mine")
    ('APGD-100', 'Co-Attack', 'mine')
    """
    name, _, variant = label.partition("_")
    if label not in ATTACKS and name in ATTACKS and variant:
        return f"{ATTACKS[name]}-{variant}"
    return OWN.get(label) or ATTACKS.get(label, label)


def cell_name(row: Row, whole: int) -> str:
    some = f" ({row.n_images} images)" if row.n_images < whole else ""
    return f"{attack_name(row.attack)}{MADE_ON[row.made_on]}{some}"


def number(value: float | None, digits: int = 2) -> Rate:
    return Rate() if value is None else Rate(value=f"{value:.{digits}f}")


def share(value: tuple[float, float, float] | None) -> Rate:
    return Rate.of(None if value is None else (100 * value[0], 100 * value[1], 100 * value[2]))


def constant_table(results: AlignmentResults) -> Table:
    """R^2 before anything else: what a static correction could do at best."""
    layers = [layer for layer in results.misalignment if layer.layer in ("projection output", "tokens to fusion")]
    lines = []
    for layer in layers:
        affine = None if layer.explained_by_affine is None else 100 * layer.explained_by_affine
        of = f"{layer.model}, {attack_name(layer.attack)}, {layer.encoder} {layer.layer}"
        lines.append((of, [share(layer.explained_by_shift), number(affine, 1)]))
    return Table(
        title="Share of the shift that a static correction can explain at best (%)",
        header=["model, attack, place", "one constant vector (R²)", "one scale and shift per channel"],
        lines=lines,
    )


def layer_tables(layers: Sequence[Layer]) -> list[Table]:
    header = [
        "attack, encoder, layer",
        "channels",
        "R² of a constant (%)",
        "R² of an affine map (%)",
        "mean shift (std)",
        "Wasserstein-1 (std)",
        "uniformity, clean",
        "uniformity, attacked",
        "rank correlation",
    ]
    made = []
    for model in dict.fromkeys(layer.model for layer in layers):
        lines = []
        for layer in layers:
            if layer.model != model:
                continue
            affine = None if layer.explained_by_affine is None else 100 * layer.explained_by_affine
            cells = [
                Rate(value=str(layer.channels)),
                share(layer.explained_by_shift),
                number(affine, 1),
                number(layer.mean_shift),
                number(layer.wasserstein),
                number(layer.uniformity_clean, 3),
                number(layer.uniformity_adversarial, 3),
                number(layer.rank_correlation, 3),
            ]
            lines.append((f"{attack_name(layer.attack)}, {layer.encoder}, {layer.layer}", cells))
        made.append(Table(title=f"{model}, every layer", header=header, lines=lines))
    return made


def removed_table(results: AlignmentResults) -> Table:
    """On test pairs whose attack did not know of the correction, and what it costs clean features."""
    attacks = list(dict.fromkeys(part.attack for part in results.removed))
    found = {(part.model, part.correction, part.site, part.attack): part for part in results.removed}
    lines = []
    for model, correction, site in dict.fromkeys(key[:3] for key in found):
        parts = [found.get((model, correction, site, attack)) for attack in attacks]
        clean = next((part.clean_moved for part in parts if part), None)
        loss = results.calibration.losses[model].get(correction)
        cells = [*(Rate.of(part.removed if part else None) for part in parts), Rate.of(clean), number(loss, 3)]
        lines.append((f"{model}, {named(correction)}, {site}", cells))
    for model, losses in results.calibration.losses.items():
        lines.append((f"{model}, none", [*(Rate() for _ in attacks), Rate(), number(losses.get("none"), 3)]))
    names = [f"shift removed, {attack_name(attack)} made without it (%)" for attack in attacks]
    return Table(
        title="On test features: share of the squared shift removed, and clean features moved",
        header=["model, correction, place", *names, "clean features moved (%)", "calibration loss"],
        lines=lines,
    )


def cells_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(attack, made on) in the order of the tables: clean, each attack without and then through, worst last."""
    attacks = list(dict.fromkeys(row.attack for row in rows if row.attack not in WORST))
    order = ["", "uncorrected", "corrected", "other"]
    known = {(row.attack, row.made_on) for row in rows}
    cells = [(attack, on) for attack in attacks for on in order if (attack, on) in known]
    return cells + [(attack, "") for attack in WORST if (attack, "") in known]


def headline_tables(results: AlignmentResults) -> list[Table]:
    """What each correction changes of mean recall."""
    return [_table(results, "mean", "change", "change of mean recall in points")] if results.rows else []


def recall_tables(results: AlignmentResults) -> list[Table]:
    return [
        _table(results, metric, "values", f"{metric.upper()} (%)", model=model)
        for model in dict.fromkeys(row.model for row in results.rows)
        for metric in ("r@1", "r@10")
    ]


def _table(results: AlignmentResults, metric: str, what: str, title: str, model: str | None = None) -> Table:
    rows = [row for row in results.rows if model in (None, row.model)]
    if what == "change":
        rows = [row for row in rows if row.correction != "none"]
    found: Mapping[tuple[str, str, str, str], Row] = {
        (row.model, row.correction, row.attack, row.made_on): row for row in rows
    }
    cells = cells_of(rows)
    names = [
        cell_name(next(row for row in rows if (row.attack, row.made_on) == cell), results.n_images) for cell in cells
    ]
    lines = []
    for key in dict.fromkeys((row.model, row.correction) for row in rows):
        values = [
            Rate.of(getattr(row, what).get(metric)) if (row := found.get((*key, *cell))) else Rate() for cell in cells
        ]
        mark = " (chosen)" if results.chosen.get(key[0]) == key[1] else ""
        label = f"{named(key[1])}{mark}"
        lines.append((label if model else f"{key[0]}, {label}", values))
    head = "correction" if model else "model, correction"
    return Table(title=f"{model}: {title}" if model else title.capitalize(), header=[head, *names], lines=lines)


def versus_table(results: AlignmentResults) -> Table:
    rows = [
        Row(
            model=v.model,
            correction=v.other,
            attack=v.attack,
            made_on=v.made_on,
            n_images=results.n_images,
            values=v.values,
            change={},
        )
        for v in results.versus
    ]
    return _table(
        results.model_copy(update={"rows": rows, "chosen": {}}), "mean", "values", "mean recall, dynamic minus other"
    )
