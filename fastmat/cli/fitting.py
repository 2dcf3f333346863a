"""What an attack learns before it attacks: from data of its own, once per surrogate and radius, kept with the set."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from fastmat.attacks.base import Attack
from fastmat.attacks.engine import Engine, executing
from fastmat.build import Component, build_data
from fastmat.cli.common import Interrupted
from fastmat.cli.config import AttackConfig, EvalConfig, TaskConfig
from fastmat.cli.pipeline_config import PipelineConfig
from fastmat.cli.together import Processes
from fastmat.data.loader import EvaluationBatches, evaluation_batches
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import Batch

FITTED = "fitted.safetensors"  # in the folder of an adversarial set


class Kept(Protocol):
    """An attack whose fit is kept."""

    def save(self, path: Path) -> None: ...
    def load(self, path: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class FitSet:
    """The data that attacks are fitted to, none of which is judged, and how it is read."""

    dataset: RetrievalSet
    batch_size: int
    workers: int
    image_cache: Path | None

    def inputs(self) -> dict[str, Any]:
        """What a fit depends on besides attack and surrogate: also the batches, each of which is one step."""
        return {"fit": {"data": self.dataset.fingerprint(), "batch_size": self.batch_size}}

    def batches(self, surrogate: VisionLanguageModel) -> EvaluationBatches:
        return evaluation_batches(
            self.dataset,
            surrogate.image_transform,
            batch_size=self.batch_size,
            workers=self.workers,
            image_cache=self.image_cache,
        )


def first_to_fit(attacks: Mapping[str, Sequence[tuple[Component, Attack, str | None]]]) -> str | None:
    """Where in the config the first attack stands that is fitted before it attacks; attacks: by label."""
    return next((f"attacks.{label}" for label, ((_, attack, _), *_) in attacks.items() if attack.needs_fit), None)


def fit_set(
    config: AttackConfig | EvalConfig | TaskConfig | PipelineConfig, judged: RetrievalSet, *, needed_by: str | None
) -> FitSet | None:
    """The data of `fit_data`, None where no attack needs it. needed_by: where in the config the first one stands.

    Raises UserError when it is missing, or is the data that is judged. Images with the same ids are a warning.
    """
    if needed_by is None:
        return None
    if config.fit_data is None:
        raise UserError(
            f"{needed_by}: this attack is fitted before it attacks: set fit_data to data that is not judged, such as a "
            "training split, or perturbation to a file of an earlier fit"
        )
    where = "fit_data"
    dataset = build_data(config.fit_data, where=where)
    if config.fit_limit is not None:
        try:
            dataset = dataset.take(config.fit_limit)
        except UserError as error:
            raise UserError(f"fit_limit: {error}") from error
    if dataset.fingerprint() == judged.fingerprint():
        raise UserError(f"{where}: is the data that is judged; fit on other data, such as a training split")
    common = len(set(dataset.ids) & set(judged.ids))
    if common:
        warnings.warn(f"{where}: {common} of {judged.n_images} images that are judged have ids of images fitted on")
    return FitSet(dataset=dataset, batch_size=config.batch_size, workers=config.workers, image_cache=config.image_cache)


def fitted(
    attack: Attack,
    fit_on: FitSet,
    surrogate: VisionLanguageModel,
    folder: Path,
    *,
    engine: Engine,
    processes: Processes,
    stop_asked: Callable[[], bool],
) -> None:
    """Fit `attack` to `surrogate`, or load what an interrupted run has fitted; the first process fits for all."""
    file, kept = folder / FITTED, cast("Kept", attack)

    def content() -> bytes:
        if not file.exists():
            with executing(engine, surrogate):
                attack.fit(surrogate, Stoppable(fit_on.batches(surrogate), stop_asked))
            kept.save(file)
        return file.read_bytes()

    fit = processes.agreed(content)
    with tempfile.TemporaryDirectory() as temporary:  # the first process may have written where others cannot read
        copy = Path(temporary) / FITTED
        copy.write_bytes(fit)
        kept.load(copy)


@dataclass(frozen=True)
class Stoppable:
    """Batches that can be gone through again, and end a fit when Ctrl-C came."""

    batches: EvaluationBatches
    stop_asked: Callable[[], bool]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            if self.stop_asked():
                raise Interrupted("a fit was not finished; the same command with --resume begins it again")
            yield batch
