"""A training run's weights as a folder that open_clip or transformers load unchanged, with a model card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from fastmat.build import MODELS, Component, build_model, build_threat, construct, parse
from fastmat.cli.common import label_of
from fastmat.cli.watching import told_to
from fastmat.errors import UserError
from fastmat.evaluation.results import Row, read_results, write_atomic
from fastmat.models.adapters import AdapterSettings, add_adapters, merged
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.weights import load_weights
from fastmat.report.model_card import model_card
from fastmat.training.checkpoint import best_checkpoint, checkpoints, damaged_file, flush
from fastmat.training.results import Validated, read_log

LIBRARIES = {"open_clip": "open_clip", "hf_clip": "transformers"}


def is_training_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()


def export_run(run: Path, out: Path, *, which: str | None, results: Path | None, victim: str | None) -> str:
    """Write the model of `run` into the new folder `out`, which appears whole or not at all; its library's name.

    which: "best", "last" or the name of a checkpoint; None: the best where the run was validated, else the last.
    results: an evaluation, whose rows of this model stand in the card; victim: its label there, found by its weights
    where None. The folder is loaded again by the library, and must give the features of the trained model.
    Raises UserError where the model is of no library, the checkpoint is damaged, or the evaluation is of another model.
    """
    told = told_to(run)
    config = told["config"]
    component = parse(config["model"], MODELS, where="model")
    if component.name not in LIBRARIES:
        raise UserError(
            f"the model '{component.name}' is of no other library; its weights are plain safetensors already: "
            f"{run / 'model.safetensors'}"
        )
    library = LIBRARIES[component.name]
    checkpoint = chosen(run, which)
    rows = [] if results is None else rows_of(results, victim, run=run)
    model = trained_model(component, config.get("adapters"), checkpoint)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        exported = write_model(component, cast("nn.Module", model).state_dict(), partial)
        from fastmat.models.export import check_same

        check_same(model, exported)
        steps = int(checkpoint.name.removeprefix("step-"))
        card = model_card(
            told,
            threat=build_threat(config["threat"]),
            library=library,
            start=start_of(component),
            steps=steps,
            rows=rows,
            validated=judged(run, steps),
        )
        write_atomic(partial / "README.md", card.encode())
        for path in [*partial.iterdir(), partial]:
            flush(path)
        if out.is_dir():
            out.rmdir()  # it was seen to be empty
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return library


def chosen(run: Path, which: str | None) -> Path:
    """The checkpoint to export, undamaged."""
    folder = run / "checkpoints"
    best = best_checkpoint(folder)
    if which == "best" and best is None:
        raise UserError(f"--checkpoint best: {run} was not validated, so none is the best; name another, or last")
    found = {path.name: path for path in checkpoints(folder)}
    last = list(found.values())[-1]
    names = {**found, "last": last, "best": best or last}
    if which is not None and which not in names:
        raise UserError(f"--checkpoint {which}: {run} has {', '.join(found)}; name one of them, best or last")
    checkpoint = names[which or "best"]
    damaged = damaged_file(checkpoint)
    if damaged is not None:
        raise UserError(f"{checkpoint} is damaged ({damaged}); export another one with --checkpoint")
    return checkpoint


def trained_model(component: Component, adapters: Mapping[str, Any] | None, checkpoint: Path) -> DualEncoder:
    """The model of a checkpoint, its adapters added to its weights."""
    model = cast("DualEncoder", build_model(component))
    if adapters is None:
        load_weights(model, checkpoint / "weights.safetensors")
        return model
    add_adapters(model, construct(AdapterSettings, adapters, where="adapters"))
    load_weights(model, checkpoint / "weights.safetensors")
    return merged(model)


def write_model(component: Component, state: Mapping[str, Tensor], folder: Path) -> DualEncoder:
    """The library's files, and what the library makes of them."""
    from fastmat.models.export import export_hf_clip, export_open_clip

    arguments = {key: value for key, value in component.arguments.items() if key != "weights"}
    write = export_open_clip if component.name == "open_clip" else export_hf_clip
    return write(state, folder, **arguments)  # checked when the run's config was read


def start_of(component: Component) -> str:
    """What the card calls the model before training: without a machine's paths."""
    pretrained = component.arguments.get("pretrained")
    tag = f" ({Path(str(pretrained)).name})" if pretrained else ""
    return f"{label_of(component)}{tag}"


def rows_of(results: Path, victim: str | None, *, run: Path) -> list[Row]:
    """The rows of this run's model in an evaluation."""
    found = read_results(results)
    victims: Mapping[str, Any] = found.config.get("victims", {})
    if victim is None:
        victim = next((label for label, of in victims.items() if _from(of, run)), None)
    rows = [row for row in found.rows if row.victim == victim]
    if not rows:
        known = ", ".join(dict.fromkeys(row.victim for row in found.rows)) or "none"
        raise UserError(
            f"--results {results} judges {known}, none of which has weights out of {run}; name the victim by --victim"
        )
    return rows


def _from(victim: Mapping[str, Any], run: Path) -> bool:
    """Whether an evaluation's victim has weights that lie in the run's folder."""
    weights = victim.get("model", {}).get("weights")
    return weights is not None and Path(weights).resolve().is_relative_to(run.resolve())


def judged(run: Path, steps: int) -> Validated | None:
    """The validation of the checkpoint after `steps` steps."""
    return next((line for line in read_log(run / "log.jsonl").validated if line.step == steps), None)
