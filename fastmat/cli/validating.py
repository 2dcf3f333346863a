"""Robust validation while a model trains: the same few images and captions, attacked anew at every checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from fastmat.attacks.base import Attack
from fastmat.build import Component, build_attack, build_data, build_threat
from fastmat.cli.config import ValidationConfig
from fastmat.cli.together import Processes
from fastmat.data.loader import EvaluationBatches, evaluation_batches
from fastmat.errors import UserError
from fastmat.evaluation.evaluate import Attacked, Gallery, encode_gallery, gallery_context, gallery_ranks, run_attack
from fastmat.evaluation.metrics import Ranks, recalls
from fastmat.evaluation.subset import PickedBatches, draw_rows, picked
from fastmat.models.protocol import VisionLanguageModel
from fastmat.report.labels import radius, words
from fastmat.text.candidate_cache import CandidateCache
from fastmat.training.results import read_log
from fastmat.types import Batch, ImageTransform

# Of a gallery ranked by cosine.
TENSORS = ("image_features", "image_group", "text_features", "text_group", "txt2img")


class RobustValidation:
    """A `Watcher` that ranks images and captions, clean and attacked, by the model of a checkpoint.

    The images are drawn by the seed, and they and their captions are the whole gallery. The processes share the work;
    the result is that of one, to rounding. Nothing of the training is touched. threat: the run's, where the config
    names none; mlm: loads the masked language model, called where words are attacked.
    Raises UserError for an attack that must be fitted first, and for fewer images than processes.
    """

    def __init__(
        self,
        config: ValidationConfig,
        *,
        out: Path,
        transform: ImageTransform,
        threat: Mapping[str, Any],
        mlm: Callable[[], object],
        seed: int,
        save_every: int,
        steps: int,
        processes: Processes,
        candidate_cache: CandidateCache | None = None,
    ) -> None:
        self.log = out / "log.jsonl"
        self.processes = processes
        self.every = config.every * save_every
        self.last = steps
        budget = build_threat(config.threat or threat, where="validation.threat")
        self.attack: Attack = build_attack(
            config.attack,
            threat=budget,
            mlm=mlm,
            seed=seed,
            candidate_cache=candidate_cache,
            where="validation.attack",
        )
        if self.attack.needs_fit:
            raise UserError(f"validation.attack: {config.attack.name} must be fitted before it attacks; take another")
        dataset = build_data(config.data, where="validation.data")
        count = min(config.images, dataset.n_images)
        if count < processes.count:
            raise UserError(f"validation.images: {count} cannot be shared by {processes.count} processes; take more")
        batches = evaluation_batches(dataset, transform, batch_size=config.batch_size)
        self.batches = share_of(batches, draw_rows(dataset.n_images, count, seed=seed), processes)
        self.metric = metric_of(config.attack, self.attack, count)

    def logged(self, line: Mapping[str, Any]) -> None:
        pass

    def saved(
        self, step: int, checkpoint: Path, attacked: AbstractContextManager[VisionLanguageModel]
    ) -> Mapping[str, Any] | None:
        told = self.processes.agreed(lambda: self._before(step))
        if told is None:
            return None
        start = time.perf_counter()
        with attacked as model:
            clean, robust = self._ranks(model)
        rates = {name: rates_of(ranks) for name, ranks in (("clean", clean), ("robust", robust))}
        score = (rates["robust"]["tr"] + rates["robust"]["ir"]) / 2
        seconds = round(time.perf_counter() - start, 3)
        validation = {"metric": self.metric, "score": score, **rates, "seconds": seconds}
        return {"validation": validation, "best": score > told}

    def _before(self, step: int) -> float | None:
        """The best score of the steps before; None where this step is not to be judged, or has been."""
        due = step % self.every == 0 or step == self.last
        lines = read_log(self.log).validated if due and self.log.exists() else []
        if not due or any(line.step == step for line in lines):
            return None
        return max((x.validation.score for x in lines if x.validation.metric == self.metric), default=-1.0)

    def _ranks(self, model: VisionLanguageModel) -> tuple[Ranks, Ranks]:
        device = model.logit_scale.device
        gallery = self._whole(lambda: encode_gallery(model, self.batches), device)
        context = gallery_context(gallery)
        pairs = only_pairs(run_attack(model, self.attack, self.batches, context))
        return gallery_ranks(gallery), gallery_ranks(self._whole(lambda: encode_gallery(model, pairs), device))

    def _whole(self, encode: Callable[[], Gallery], device: torch.device) -> Gallery:
        """The galleries that the processes made of their shares, as one. All see the UserError of any."""
        own: Gallery | UserError
        try:
            own = moved(encode(), "cpu")
        except UserError as error:
            own = error
        parts = []
        for part in self.processes.all(own):
            if isinstance(part, UserError):
                raise part
            parts.append(part)
        return moved(joined(parts), device)


def share_of(batches: EvaluationBatches, rows: tuple[int, ...], processes: Processes) -> PickedBatches:
    """Consecutive `rows`, in batches, about as many for each process."""
    begin, end = (len(rows) * rank // processes.count for rank in (processes.rank, processes.rank + 1))
    return picked(batches, rows[begin:end])


def only_pairs(attacked: Iterable[Attacked]) -> Iterable[Batch]:
    return (part.pairs for part in attacked)


def moved(gallery: Gallery, device: torch.device | str) -> Gallery:
    columns: dict[str, Any] = {name: getattr(gallery, name).to(device) for name in TENSORS}
    return Gallery(**columns)


def joined(parts: list[Gallery]) -> Gallery:
    """One below the other."""
    before, txt2img = 0, []
    for part in parts:
        txt2img.append(part.txt2img + before)
        before += len(part.image_features)
    columns: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in TENSORS if name != "txt2img"
    }
    return Gallery(**columns, txt2img=torch.cat(txt2img))


def rates_of(ranks: Ranks) -> dict[str, float]:
    found = recalls(ranks)
    return {"tr": round(found["tr@1"], 4), "ir": round(found["ir@1"], 4)}


def metric_of(component: Component, attack: Attack, images: int) -> str:
    """What a score is, so that only equals are compared."""
    threat = attack.threat
    budget = f"eps {radius(threat.eps, threat.norm)} {threat.norm}, {words(threat.max_words)}"
    return f"mean of TR@1 and IR@1 of {images} images and their captions under {component.name} ({budget})"
