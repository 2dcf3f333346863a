"""What looks on while `fastmat train` runs: robust validation, a tracker, and the page with the curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from fastmat.cli.config import TrainConfig
from fastmat.cli.together import Processes
from fastmat.cli.validating import RobustValidation
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.report.training import write_training_report
from fastmat.text.candidate_cache import CandidateCache
from fastmat.training.checkpoint import checkpoints
from fastmat.training.settings import TrainSettings
from fastmat.training.trackers import Tracking
from fastmat.training.watch import Watcher
from fastmat.types import ImageTransform


class Page:
    """A `Watcher` that draws `out/report.html` anew when a checkpoint has been judged, and when it is closed."""

    def __init__(self, out: Path, *, first: bool) -> None:
        self.out = out
        self.first = first

    def logged(self, line: Mapping[str, Any]) -> None:
        if "validation" in line:
            self.draw()

    def saved(
        self, step: int, checkpoint: Path, attacked: AbstractContextManager[VisionLanguageModel]
    ) -> Mapping[str, Any] | None:
        return None

    def draw(self) -> None:
        """Nothing before the first checkpoint, what is left until then is no run, nor before the first line."""
        if self.first and checkpoints(self.out / "checkpoints") and (self.out / "log.jsonl").exists():
            write_training_report(self.out, about=told_to(self.out))


@contextmanager
def watching(
    config: TrainConfig,
    settings: TrainSettings,
    *,
    out: Path,
    told: Mapping[str, Any],
    transform: ImageTransform,
    mlm: Callable[[], object],
    accelerator: Accelerator,
    candidate_cache: CandidateCache | None,
) -> Iterator[list[Watcher]]:
    """The watchers of a run; what they keep is complete when it ends, however it ends.

    told: what decides the weights. mlm: loads the masked language model. Raises UserError for a validation that cannot
    be, before a step is taken.
    """
    watchers: list[Watcher] = []
    if config.validation is not None:
        validation = RobustValidation(
            config.validation,
            out=out,
            transform=transform,
            threat=config.threat,
            mlm=mlm,
            seed=config.seed,
            save_every=settings.save_every,
            steps=settings.steps,
            processes=Processes(rank=accelerator.process_index, count=accelerator.num_processes),
            candidate_cache=candidate_cache,
        )
        watchers.append(validation)
    page = Page(out, first=accelerator.is_main_process)
    tracking = Tracking(config.tracker, out=out, told=told, accelerator=accelerator)
    try:
        yield [*watchers, tracking, page]
    finally:
        tracking.close()
        page.draw()


def told_to(out: Path) -> dict[str, Any]:
    """What the run in `out` was told, as its newest checkpoint has it. Raises UserError where there is none."""
    found = checkpoints(out / "checkpoints")
    try:
        state = json.loads((found[-1] / "state.json").read_text())
        return {**state["told"], "written_by": state["written_by"]}
    except (IndexError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{out} holds no checkpoint that can be read; name the folder of a training run") from error
