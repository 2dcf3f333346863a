"""The README.md of an exported model: how it was made, against what, on what, and how well."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastmat.evaluation.results import Row
from fastmat.report.labels import attack_name, budget, defence_name, radius, source, words
from fastmat.training.results import Validated
from fastmat.types import ThreatModel

CODE = {
    "open_clip": """import open_clip

model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")  # or "hf-hub:NAME"
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")""",
    "transformers": """from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("FOLDER")
processor = CLIPProcessor.from_pretrained("FOLDER")""",
}
# Settings of a defence or of the data that are named in their own line, or say where files lie on one machine.
APART = ("name", "title", "split", "annotations", "images", "weights")


def model_card(
    told: Mapping[str, Any],
    *,
    threat: ThreatModel,
    library: str,
    start: str,
    steps: int,
    rows: Sequence[Row] = (),
    validated: Validated | None = None,
) -> str:
    """The card as Markdown. Names out of the run cannot break its tables, and paths of a machine are not told.

    told: what the run was told; threat: the budgets out of it. library: "open_clip" or "transformers". start: the model
    it starts from. steps: after which the weights were taken. rows: of an evaluation of these weights. validated: their
    validation.
    """
    config = told["config"]
    defence, data = config["defence"], config["data"]
    settings = told.get("settings", {})
    made = [
        ("start", start),
        ("defence", defence_name(defence["name"])),
        *((f"{key} of the defence", value) for key, value in defence.items() if key not in APART),
        ("outer steps", f"{steps:,} of {settings.get('steps', steps):,}"),
        ("images per step", config.get("batch_size")),
        *((key, settings[key]) for key in ("lr", "weight_decay", "precision") if key in settings),
        ("seed", config.get("seed")),
    ]
    used = [
        ("set", data.get("title") or data["name"]),
        *([("split", data["split"])] if "split" in data else []),
        *([("first images only", config["limit"])] if config.get("limit") else []),
        ("captions drawn per image and step", config.get("captions_per_image")),
        *([("augmentation", config["augment"])] if config.get("augment") else []),
        ("fingerprint", config.get("data_fingerprint")),
    ]
    page = Environment(
        loader=PackageLoader("fastmat.report", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return page.get_template("model_card.md.jinja").render(
        library=library,
        title=cell(f"{start}, {defence_name(defence['name'])}"),
        code=CODE[library],
        made=[(cell(name), cell(value)) for name, value in made],
        threat=threat_sentence(threat),
        data=[(cell(name), cell(value)) for name, value in used],
        rows=[cells_of(row, rows) for row in rows],
        validation=validation_sentence(validated),
    )


def threat_sentence(threat: ThreatModel) -> str:
    """What the attacks of the training were allowed."""
    moved = "each pixel" if threat.norm == "linf" else "an image, in the 2-norm,"
    return (
        f"In training, attacks might move {moved} by at most {radius(threat.eps, threat.norm)} (pixels in [0, 1], "
        f"{threat.norm}) and substitute at most {words(threat.max_words)} of a caption."
    )


def validation_sentence(validated: Validated | None) -> str:
    if validated is None:
        return ""
    said = validated.validation
    return (
        f"{said.score:.1f}, the {cell(said.metric)} (clean TR@1 {said.clean.tr:.1f}, IR@1 {said.clean.ir:.1f}; robust "
        f"TR@1 {said.robust.tr:.1f}, IR@1 {said.robust.ir:.1f})."
    )


def cells_of(row: Row, rows: Sequence[Row]) -> list[str]:
    """One line of the table."""
    alike = [other for other in rows if other.threat == row.threat]
    name = " ".join(part for part in (attack_name(row.attack), source(row)) if part)
    rates = [with_interval(row, metric) for metric in ("tr@1", "tr@5", "ir@1", "ir@5")]
    used = budget(row.threat, alike) if row.attack != "none" else ""
    return [cell(x) for x in (name, used, f"{row.dataset} {row.split}", f"{row.n_images:,}", *rates)]


def with_interval(row: Row, metric: str) -> str:
    value, interval = row.value(metric), row.ci.get(metric)
    return f"{value:.1f}" + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")


def cell(value: object) -> str:
    """Text that stays in its cell; of a path, its last part alone."""
    text = " ".join(str(value).split())
    if re.fullmatch(r"[~.]{0,2}/\S+", text):
        text = Path(text).name
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
