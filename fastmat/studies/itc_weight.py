"""How the weight of the contrastive loss moves robustness.

A fusion model (ALBEF, BLIP) is trained by contrast and by matching; published code weighs them 1:1. Here every ratio is
trained by every defence from the same start, attacked through each of its objectives, and ranked by cosine, by the
matching head, and by both. What the shortlist keeps is told apart from what the head makes of it. For CLIP, which has
no matching head, the second term is the distance of image embeddings to those of the original model.

    fastmat study itc-weight --out runs/itc-weight
    fastmat study itc-weight --config itc-weight-coco-study --out runs/itc-weight-coco
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fastmat.attacks.base import Attack
from fastmat.build import (
    Component,
    build_attack,
    build_data,
    build_model,
    build_threat,
    resolve_device,
)
from fastmat.cli.common import MlmLoader, open_candidates
from fastmat.cli.config import (
    AttackChoice,
    Data,
    DefenceChoice,
    Device,
    EvalBatch,
    Label,
    Limit,
    Matching,
    Mlm,
    Model,
    Number,
    Section,
    Settings,
    Threat,
    TrainBatch,
    TrainingData,
    Workers,
)
from fastmat.cli.load import plain
from fastmat.data.loader import evaluation_batches
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError
from fastmat.evaluation.evaluate import Measured, encode_gallery, gallery_context, run_attack
from fastmat.evaluation.manifest import config_fingerprint
from fastmat.evaluation.rerank import Rerank
from fastmat.evaluation.results import environment
from fastmat.evaluation.stages import Counts, Stages, counts_of, drops_of, stages_of
from fastmat.studies.estimates import estimates
from fastmat.studies.itc_weight_report import write_study
from fastmat.studies.outcomes import read_outcome, write_outcome
from fastmat.studies.results import Line, StudyResults
from fastmat.studies.trained import Trained, started, trained, untrained
from fastmat.training.mlm import train_mlm

CONFIG = "itc-weight-study"
SUM = 2.0  # of both weights, whatever their ratio: as large a loss as published, 1:1
Weight = tuple[Number, Number]


class Part(Section):
    """One kind of model."""

    model: Model = Field(description="where training starts; the words of the training captions are its vocabulary")
    pretrain: Settings | None = Field(
        None, description="training from random weights, of both terms alike, for every seed; null: the model as it is"
    )
    one_start: bool = Field(False, description="all seeds begin where the first one does: one pre-training, not many")
    train: Settings = Field(description="what follows, for every weight and defence from the same start")
    defences: dict[Label, DefenceChoice] = Field(min_length=1, description="defences, by label")
    attacks: dict[Label, AttackChoice] = Field(min_length=1, description="attacks, by label, through the model itself")
    batch_size: TrainBatch = 64


class FusionPart(Part):
    """Contrast against matching."""

    matching: Matching = None
    rerank_k: int = Field(gt=0, description="candidates per query that the matching head puts in order")
    inner: Literal["own", "contrastive", "itm", "itc_itm"] = Field(
        "own",
        description="what inner attacks ascend, where the defence does not say: own is the weighted loss that is "
        "trained, the others are the same for every weight",
    )


class ClipPart(Part):
    """Contrast against the uni-modal distances of `mat`: its pairs have the first weight, its distances the second."""


class Config(Section):
    """`fastmat study itc-weight`."""

    train_data: TrainingData = Field(description="training images and captions")
    train_limit: Limit = None
    data: Data = Field(description="images and captions that are attacked")
    limit: Limit = None
    mlm: Mlm = None
    mlm_steps: int | None = Field(None, gt=0, description="train a small mlm on the training captions, for so long")
    threat: Threat = {}  # noqa: RUF012
    weights: tuple[Weight, ...] = Field(
        ((1.0, 0.0), (1.0, 0.25), (1.0, 1.0), (0.25, 1.0), (0.0, 1.0)),
        min_length=1,
        description="of the contrastive and of the other term; their sum is made 2, as published (1:1)",
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="of start, batches and attacks")
    fusion: FusionPart | None = Field(None, description="a fusion model: contrast against matching; null: none")
    clip: ClipPart | None = Field(None, description="a dual encoder: contrast against distances; null: none")
    device: Device = "auto"
    test_batch_size: EvalBatch = 32
    workers: Workers = 0
    resamples: int = Field(1000, gt=0, description="bootstrap resamples behind the 95 % intervals")
    short: dict[str, Any] = Field({}, description="dotted key: value, what --short overrides")

    @model_validator(mode="after")
    def something_to_do(self) -> Config:
        if self.fusion is None and self.clip is None:
            raise UserError("there is nothing to study: set fusion or clip")
        for ours, other in self.weights:
            if not (ours >= 0 and other >= 0 and ours + other > 0):
                raise UserError(
                    f"weights: a ratio needs two numbers that are not negative, one above 0; got {ours:g}:{other:g}"
                )
        if len(set(map(ratio, self.weights))) < len(self.weights) or len(set(self.seeds)) < len(self.seeds):
            raise UserError("weights and seeds: each may stand once")
        for label, defence in self.clip.defences.items() if self.clip else ():
            if defence.name != "mat" or not defence.arguments.get("distances"):
                raise UserError(
                    f"clip.defences.{label} must be mat with distances, such as {{image-adv-teacher: 1}}: they are "
                    "what the contrastive term is weighed against"
                )
        return self


def ratio(weight: Weight) -> str:
    """
    >>> ratio((1.0, 0.25))
    '1:0.25'
    """
    return f"{weight[0]:g}:{weight[1]:g}"


def normalised(weight: Weight) -> Weight:
    """
    >>> normalised((1.0, 0.25))
    (1.6, 0.4)
    """
    return SUM * weight[0] / sum(weight), SUM * weight[1] / sum(weight)


def fused_defence(defence: Component, weight: Weight, *, inner: str) -> dict[str, Any]:
    """A defence of a fusion model, its inner attack on what is trained; one that names an objective keeps it."""
    arguments = defence.plain()
    if defence.name == "finetune" or "objective" in arguments:
        return arguments
    if inner == "own":
        itc, itm = weight
        inner = "itc_itm" if itc and itm else "contrastive" if itc else "itm"
    weighed = {"itc": weight[0], "itm": weight[1]} if inner == "itc_itm" else {}
    return {**arguments, "objective": {"name": inner, **weighed}}


def weighed_defence(defence: Component, weight: Weight) -> dict[str, Any]:
    """MAT with its pairs and its distances weighed. Without contrast, what no distance reads is not trained."""
    arguments = defence.plain()
    pairs = arguments.get("pairs") or {"adv-adv": 1.0}
    if not weight[0]:
        arguments["trains"] = sorted({name.split("-")[0] for name in arguments["distances"]})
    return {
        **arguments,
        "pairs": {name: weight[0] * own for name, own in pairs.items()},
        "distances": {name: weight[1] * own for name, own in arguments["distances"].items()},
    }


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of the study."""

    part: str
    weight: Weight
    defence: str
    seed: int

    @property
    def label(self) -> str:
        return f"{self.defence}-{ratio(self.weight).replace(':', '-')}"


class Study:
    """Everything that `config` asks for, below `out`; what is finished there is not computed again."""

    def __init__(self, config: Config, out: Path) -> None:
        self.config = config
        self.out = out
        self.device = resolve_device(config.device)
        self.threat = build_threat(config.threat)
        self.dataset = build_data(config.data, limit=config.limit)
        self.parts: dict[str, Part] = {
            name: part for name in ("fusion", "clip") if (part := getattr(config, name)) is not None
        }
        smaller = min(self.dataset.n_images, self.dataset.n_captions)
        if config.fusion is not None and config.fusion.rerank_k > smaller:
            told = f"{self.dataset.n_images} images and {self.dataset.n_captions} captions"
            raise UserError(
                f"fusion.rerank_k must be at most {smaller}, got {config.fusion.rerank_k}: there are {told}"
            )
        self.mlm = MlmLoader(config.mlm or (str(out / "mlm") if config.mlm_steps else None), self.device)
        self.candidates = open_candidates(out / "candidates")

    def run(self) -> StudyResults:
        """Train, attack, rank, and write results.json, README.md, report.html and plots."""
        (self.out / "models").mkdir(parents=True, exist_ok=True)  # the sign that there is something to go on with
        if self.config.mlm is None and self.config.mlm_steps and not (self.out / "mlm").exists():
            say("masked language model")
            train_mlm(self.training_captions, self.out / "mlm", seed=0, steps=self.config.mlm_steps)
        for name, part in self.parts.items():
            for label, component in part.attacks.items():  # a mistake in one is found before hours of training
                self.attack(component, seed=0, where=f"{name}.attacks.{label}")
        found: dict[Cell, dict[str, Stages]] = {}
        for done, seed in enumerate(self.config.seeds, 1):
            found |= {cell: self.outcomes(cell) for cell in self.cells(seed)}
            results = self.results(found, self.config.seeds[:done])
            write_study(self.out, results)  # of all seeds so far
        return results

    def results(self, found: Mapping[Cell, Mapping[str, Stages]], seeds: tuple[int, ...]) -> StudyResults:
        return StudyResults(
            study="itc-weight",
            lines=list(self.lines(found, seeds)),
            dataset=f"{self.dataset.name}/{self.dataset.split}",
            n_images=self.dataset.n_images,
            n_captions=self.dataset.n_captions,
            config=plain(self.config),
            environment=environment(self.device),
        )

    def cells(self, seed: int) -> Iterator[Cell]:
        for name, part in self.parts.items():
            for defence in part.defences:
                for weight in self.config.weights:
                    yield Cell(part=name, weight=weight, defence=defence, seed=seed)

    def outcomes(self, cell: Cell) -> dict[str, Stages]:
        """Attack to its outcome, "none" first."""
        model = self.model(cell)
        part = self.parts[cell.part]
        rerank = Rerank(k=part.rerank_k, plus_cosine=False) if isinstance(part, FusionPart) else None
        folder = self.out / "cells" / cell.part / f"seed-{cell.seed}" / cell.label
        shared = {
            "model": model.key,
            "data": self.dataset.fingerprint(),
            "threat": self.config.threat,
            "rerank_k": rerank and rerank.k,
            "batch_size": self.config.test_batch_size,
            "seed": cell.seed,
            **({"mlm": self.config.mlm} if self.config.mlm else {}),
        }
        wanted: dict[str, Component | None] = {"none": None, **part.attacks}
        inputs = {
            name: config_fingerprint({**shared, "attack": attack and attack.plain()}) for name, attack in wanted.items()
        }
        files = {name: folder / f"{name}.safetensors" for name in wanted}
        found = {name: read_outcome(files[name], inputs=inputs[name]) for name in wanted}
        missing = [name for name, stages in found.items() if stages is None]
        if missing:
            say(f"{cell.part}, {cell.label}, seed {cell.seed}: {', '.join(missing)}")
            for name, stages in self.attacked(model, {name: wanted[name] for name in missing}, rerank, seed=cell.seed):
                write_outcome(files[name], stages, inputs=inputs[name])
                found[name] = stages
        return {name: stages for name, stages in found.items() if stages is not None}

    def attacked(
        self, trained: Trained, attacks: Mapping[str, Component | None], rerank: Rerank | None, *, seed: int
    ) -> Iterator[tuple[str, Stages]]:
        """Each attack through the model itself, on every image."""
        model = build_model(trained.component(), device=self.device)
        batches = evaluation_batches(
            self.dataset,
            model.image_transform,
            batch_size=self.config.test_batch_size,
            workers=self.config.workers,
        )
        gallery = encode_gallery(model, batches, rerank=rerank)
        for name, component in attacks.items():
            if component is None:
                yield name, stages_of(gallery)
                continue
            attack = self.attack(component, seed=seed, where=f"attacks.{name}")
            made = Measured().watch(run_attack(model, attack, batches, gallery_context(gallery)))
            yield name, stages_of(encode_gallery(model, made, rerank=rerank))

    def attack(self, component: Component, *, seed: int, where: str) -> Attack:
        return build_attack(
            component, threat=self.threat, mlm=self.mlm, seed=seed, candidate_cache=self.candidates, where=where
        )

    def model(self, cell: Cell) -> Trained:
        """The cell's model, trained if it is not there."""
        part, weight = self.parts[cell.part], normalised(cell.weight)
        start = self.start(cell.part, part, cell.seed)
        defence = part.defences[cell.defence]
        if isinstance(part, FusionPart):
            told = {
                "defence": fused_defence(defence, weight, inner=part.inner),
                "matching": {**(part.matching or {}), "itc": weight[0], "itm": weight[1]},
            }
        else:
            told = {"defence": weighed_defence(defence, weight)}
        folder = self.out / "models" / cell.part / f"seed-{cell.seed}" / cell.label
        return trained(
            start,
            {**self.shared(part, cell.seed), "train": part.train, **told},
            folder,
            mlm=self.config.mlm,
            source=CONFIG,
        )

    def start(self, name: str, part: Part, seed: int) -> Trained:
        """Where all models of a part and a seed begin."""
        seed = self.config.seeds[0] if part.one_start else seed
        begin = untrained(started(part.model, seed=seed, words=lambda: self.words))
        if part.pretrain is None:
            return begin
        told: dict[str, Any] = {"defence": "finetune"}
        if isinstance(part, FusionPart):
            told["matching"] = {**(part.matching or {}), "itc": SUM / 2, "itm": SUM / 2}
        folder = self.out / "models" / name / f"seed-{seed}" / "start"
        return trained(
            begin,
            {**self.shared(part, seed), "train": part.pretrain, **told},
            folder,
            mlm=self.config.mlm,
            source=CONFIG,
        )

    def shared(self, part: Part, seed: int) -> dict[str, Any]:
        """What all training runs of a part and a seed are told."""
        config = self.config
        return {
            "data": config.train_data.plain(),
            "limit": config.train_limit,
            "mlm": self.mlm.folder,
            "candidate_cache": str(self.out / "candidates"),
            "threat": config.threat,
            "batch_size": part.batch_size,
            "workers": config.workers,
            "tracker": "none",
            "seed": seed,
        }

    @cached_property
    def training_captions(self) -> list[str]:
        dataset = build_data(self.config.train_data, limit=self.config.train_limit, where="train_data")
        assert isinstance(dataset, RetrievalSet)
        return [caption for own in dataset.captions for caption in own]

    @cached_property
    def words(self) -> list[str]:
        return sorted({word for caption in self.training_captions for word in caption.lower().split()})

    def lines(self, found: Mapping[Cell, Mapping[str, Stages]], seeds: tuple[int, ...]) -> Iterator[Line]:
        """One line for every part, defence, weight, attack and scoring, over the seeds."""
        for part, section in self.parts.items():
            for defence in section.defences:
                for weight in self.config.weights:
                    own = [found[Cell(part=part, weight=weight, defence=defence, seed=seed)] for seed in seeds]
                    for attack in own[0]:
                        for scoring in own[0][attack].ranks:
                            counts = [counts_of(outcome[attack], scoring) for outcome in own]
                            if attack != "none":
                                clean = [counts_of(outcome["none"], scoring) for outcome in own]
                                counts = [
                                    now | drops_of(before, now) for before, now in zip(clean, counts, strict=True)
                                ]
                            yield Line(
                                part=part,
                                defence=defence,
                                weight=ratio(weight),
                                attack=attack,
                                scoring=scoring,
                                values=estimates(counts, resamples=self.config.resamples),
                                by_seed=[
                                    {name: value for name in SHOWN if (value := rate(model, name)) is not None}
                                    for model in counts
                                ],
                            )


SHOWN = ("tr@1", "ir@1", "survival_tr", "survival_ir", "accuracy_tr", "accuracy_ir")  # of each seed


def rate(counts: Mapping[str, Counts], metric: str) -> float | None:
    """In percent; None where there is no such metric, or no query that counts."""
    if metric not in counts or not bool(counts[metric].queries.any()):
        return None
    return 100 * float(counts[metric].hits.sum() / counts[metric].queries.sum())


def say(stage: str) -> None:
    print(f"- {stage}", flush=True)


def run(config: Config, out: Path) -> None:
    """Everything that `config` asks for, in `out`."""
    Study(config, out).run()
    print(out / "report.html")
