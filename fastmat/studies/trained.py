"""Models that a study trains: each in a folder named by all that decides its weights, so that none is trained twice."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmat.build import MODELS, Component, locate, parameters_of
from fastmat.cli.config import TrainConfig
from fastmat.cli.load import validate
from fastmat.cli.train import train_model
from fastmat.evaluation.manifest import config_fingerprint
from fastmat.training.checkpoint import checkpoints

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model and its key, which says what decided its weights; they stand in `folder`, None: as the model comes."""

    model: Component
    key: str
    folder: Path | None = None

    def component(self) -> Component:
        """The model with its weights."""
        if self.folder is None:
            return self.model
        return Component(
            name=self.model.name, arguments={**self.model.arguments, "weights": str(self.folder / WEIGHTS)}
        )


def started(model: Component, *, seed: int, words: Callable[[], Sequence[str]]) -> Component:
    """`model` with the study's seed, and `words()` for its vocabulary where it is a small one; what it says stays."""
    arguments = dict(model.arguments)
    known = parameters_of(locate(MODELS[model.name]))
    if "seed" in known:
        arguments.setdefault("seed", seed)
    if "vocabulary" in known and model.name.startswith("small") and "vocabulary" not in arguments:
        arguments["vocabulary"] = list(words())
    return Component(name=model.name, arguments=arguments)


def untrained(model: Component) -> Trained:
    return Trained(model=model, key=config_fingerprint(model.plain()))


def trained(start: Trained, values: Mapping[str, Any], folder: Path, *, mlm: str | None, source: str) -> Trained:
    """`start` trained as `values`, a train config without its model, say; below `folder`, where it may be finished.

    A run that was stopped goes on. mlm: the language model that a user named; None: the study's own. source: what the
    config is called in errors. Raises what `train_model` does.
    """
    told = {**values, "model": start.component().plain()}
    config = validate(TrainConfig, told, source=source)
    # Not where the start lies: a study that was moved is the same study.
    key = config_fingerprint({**told, "model": start.key, "mlm": mlm, "candidate_cache": None})
    folder = folder.with_name(f"{folder.name}-{key[:8]}")
    if not (folder / WEIGHTS).exists():
        begun = bool(checkpoints(folder / "checkpoints"))
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)
        train_model(config, folder, resume=begun)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a study keeps dozens of models, and resumes none
    return Trained(model=start.model, key=key, folder=folder)
