"""The models of the study of test-time defences: trained where that is asked for, each with a detector of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastmat.attacks.base import Attack
from fastmat.build import MODELS, Component, build_data, build_model, check_weights, locate, parameters_of
from fastmat.cli.common import MlmLoader
from fastmat.data.loader import EvaluationBatches, evaluation_batches
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError
from fastmat.evaluation.evaluate import Measured, encode_gallery, gallery_context, run_attack
from fastmat.evaluation.manifest import config_fingerprint
from fastmat.guards.detector import Detector, load_detector, save_detector, spectrum, train_detector
from fastmat.models.protocol import VisionLanguageModel
from fastmat.studies.test_time_config import Candidate, Config
from fastmat.studies.trained import Trained, trained, untrained
from fastmat.training.mlm import train_mlm


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model in eval mode. key: what decided its weights. detector: the file of its own, None: it has none."""

    label: str
    key: str
    model: VisionLanguageModel
    detector: Path | None

    @cached_property
    def detects(self) -> Detector | None:
        return None if self.detector is None else load_detector(self.detector).to(self.model.logit_scale.device)


class Subjects:
    """Makes what `config.models` describes, below `out`; what is there is not made again.

    attack: builds an attack of the study. Raises UserError for weights that are not there, and where `dataset`, which
    is attacked, shares images with those that detectors are trained on.
    """

    def __init__(
        self, config: Config, out: Path, *, dataset: RetrievalSet, attack: Callable[..., Attack], mlm: MlmLoader
    ) -> None:
        self.config = config
        self.out = out
        self.attack = attack
        self.mlm = mlm
        for label, candidate in config.models.items():
            check_weights(candidate.model, where=f"models.{label}.model")
        if config.detector is not None and set(self.shown.ids) & set(dataset.ids):
            raise UserError(
                "detectors would be trained on images that they are judged on: train_data and data share some; take "
                "the train split for train_data"
            )

    def make(self, label: str, device: torch.device) -> Subject:
        ready = self.trained(label, self.config.models[label])
        model = build_model(ready.component(), device=device)
        return Subject(label=label, key=ready.key, model=model, detector=self.detector(label, ready.key, model))

    def train_mlm(self) -> None:
        """The masked language model, where the study trains its own."""
        if self.config.mlm is None and self.config.mlm_steps and not (self.out / "mlm").exists():
            say("masked language model")
            train_mlm(self.training_captions, self.out / "mlm", seed=0, steps=self.config.mlm_steps)

    def trained(self, label: str, candidate: Candidate) -> Trained:
        arguments = dict(candidate.model.arguments)
        known = parameters_of(locate(MODELS[candidate.model.name]))
        if "vocabulary" in known and candidate.model.name.startswith("small"):
            arguments.setdefault("vocabulary", self.words)
        ready = untrained(Component(name=candidate.model.name, arguments=arguments))
        stages: list[tuple[str, Any, dict[str, Any]]] = []
        if candidate.pretrain is not None:
            stages.append(("start", {"name": "finetune"}, candidate.pretrain))
        if candidate.defence is not None and candidate.train is not None:
            stages.append((label, candidate.defence.plain(), candidate.train))
        for name, defence, settings in stages:
            told = {
                "data": self.config.train_data.plain(),
                "limit": self.config.train_limit,
                "mlm": self.mlm.folder,
                "candidate_cache": str(self.out / "candidates"),
                "threat": self.config.threat,
                "defence": defence,
                "train": settings,
                "batch_size": candidate.batch_size,
                "workers": self.config.workers,
                "tracker": "none",
                "seed": self.config.seed,
            }
            ready = trained(ready, told, self.out / "models" / name, mlm=self.config.mlm, source="the study's config")
        return ready

    def detector(self, label: str, key: str, model: VisionLanguageModel) -> Path | None:
        """The file of a detector trained on clean images of the train split and on what an attack made of them."""
        part = self.config.detector
        if part is None:
            return None
        decides = {
            "model": key,
            "data": self.shown.fingerprint(),
            "threat": self.config.threat,
            "detector": {"attack": part.attack.plain(), "false_alarms": part.false_alarms},
            "seed": self.config.seed,
        }
        path = self.out / "detectors" / f"{label}-{config_fingerprint(decides)[:8]}.safetensors"
        if path.exists():
            return path
        say(f"{label}: detector")
        attack = self.attack(part.attack, where="detector.attack")
        batches = self.batches(model, self.shown)
        made = run_attack(model, attack, batches, gallery_context(encode_gallery(model, batches)))
        clean, attacked = (
            torch.cat([spectrum(batch.images) for batch in images]) for images in (batches, Measured().watch(made))
        )
        size = model.image_transform.size
        path.parent.mkdir(parents=True, exist_ok=True)
        save_detector(train_detector(clean, attacked, image_size=size, false_alarms=part.false_alarms), path)
        return path

    def batches(self, model: VisionLanguageModel, dataset: RetrievalSet) -> EvaluationBatches:
        return evaluation_batches(
            dataset,
            model.image_transform,
            batch_size=self.config.test_batch_size,
            workers=self.config.workers,
        )

    @cached_property
    def shown(self) -> RetrievalSet:
        """What detectors are trained on."""
        assert self.config.detector is not None
        return build_data(self.config.train_data, limit=self.config.detector.images, where="train_data")

    @cached_property
    def training_captions(self) -> list[str]:
        dataset = build_data(self.config.train_data, limit=self.config.train_limit, where="train_data")
        return [caption for own in dataset.captions for caption in own]

    @cached_property
    def words(self) -> list[str]:
        return sorted({word for caption in self.training_captions for word in caption.lower().split()})


def say(stage: str) -> None:
    print(f"- {stage}", flush=True)
