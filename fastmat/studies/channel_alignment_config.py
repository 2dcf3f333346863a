"""What `fastmat study channel-alignment` may be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastmat.alignment.pairs import Site
from fastmat.build import Component
from fastmat.cli.config import (
    AttackChoice,
    Data,
    DefenceChoice,
    Device,
    EvalBatch,
    Fields,
    Label,
    Limit,
    Matching,
    Mlm,
    Model,
    Section,
    Settings,
    Threat,
    TrainBatch,
    Victim,
    Workers,
)
from fastmat.errors import UserError, nearest

Kind = Literal[
    "mean", "mean_variance", "least_squares", "subspace", "gate", "constant_gate", "shuffled_gate", "random_gate",
    "oracle", "file",
]  # fmt: skip
STATIC = ("mean", "mean_variance", "least_squares", "constant_gate")
REFERRING = ("shuffled_gate", "random_gate")
ONLY = {"shrinkage": ("mean", "mean_variance", "least_squares"), "rank": ("subspace", "oracle"), "path": ("file",)}


class Correction(Section):
    """A correction, or a control."""

    kind: Kind = Field(
        description="static: mean, mean_variance, least_squares; dynamic: gate. Controls: subspace (static, not by "
        "channel), constant_gate (static, trained, with the parameters of a gate), shuffled_gate, random_gate, oracle "
        "(told the clean features). file: made before"
    )
    shrinkage: float = Field(0.0, ge=0, le=1, description="of a static one, towards the identity")
    rank: int | None = Field(None, gt=0, description="directions of subspace and oracle; an oracle without: all")
    of: Label | None = Field(None, description="the gate whose inputs are shuffled, or whose size a random one takes")
    path: Path | None = Field(None, description="a file of corrections, for the model of that name: {model}")

    @model_validator(mode="after")
    def fits_its_kind(self) -> Correction:
        for name, kinds in {**ONLY, "of": REFERRING}.items():
            if getattr(self, name) != type(self).model_fields[name].default and self.kind not in kinds:
                raise UserError(f"{name} is no setting of a correction of kind {self.kind}; leave it out")
        for name, kinds in (("rank", ("subspace",)), ("of", REFERRING), ("path", ("file",))):
            if self.kind in kinds and getattr(self, name) is None:
                raise UserError(f"a correction of kind {self.kind} needs {name}; set it")
        return self


class Trained(Section):
    """Models that the study trains itself, from one start."""

    model: Model = Field(description="where training starts; the words of the training captions are its vocabulary")
    pretrain: Settings = Field(description="fine-tuning from random weights, for every seed")
    train: Settings = Field(description="what follows, for every defence")
    defences: dict[Label, DefenceChoice] = Field(min_length=1, description="models by label: the defence of each")
    batch_size: TrainBatch = 64
    matching: Matching = None
    rerank_k: int | None = Field(None, gt=0, description="of a fusion model: candidates that the matching head orders")


class Config(Section):
    """`fastmat study channel-alignment`."""

    train_data: Data = Field(description="images and captions to train and to calibrate on")
    calibration_images: int = Field(500, gt=1, description="of train_data, drawn by the seed: calibration pairs")
    data: Data = Field(description="images and captions that are attacked and ranked; none of the calibration's")
    limit: Limit = None
    mlm: Mlm = None
    mlm_steps: int | None = Field(None, gt=0, description="train a small mlm on the training captions, for so long")
    threat: Threat = {}  # noqa: RUF012
    models: dict[Label, Victim] = Field({}, description="models as they are, plain and hardened, by label")
    trained: Trained | None = Field(None, description="models that the study trains; null: none")
    sites: tuple[Site, ...] = Field(
        ("image",), min_length=1, description="where corrections stand: image, text (projections), tokens (to fusion)"
    )
    calibration: AttackChoice = Field(
        Component(name="pgd"), description="makes calibration pairs; text needs one that changes words"
    )
    gate: Annotated[dict[str, Any], Fields("fastmat.alignment.training:GateSettings")] = Field(
        {}, description="gates and how they are trained"
    )
    corrections: dict[Label, Correction] = Field(min_length=1, description="what is compared, by label")
    attacks: dict[Label, AttackChoice] = Field(min_length=1, description="attacks through each correction: adaptive")
    not_adaptive: tuple[Label, ...] = Field(
        (),
        description="of those, also made without the correction, as a warning beside; features are measured on them",
    )
    transfer: tuple[Label, ...] = Field((), description="of those, the ones also made on another model of the study")
    transfer_from: dict[Label, Label] = Field({}, description="whose attacks a model gets; else the next model's")
    subset: dict[Label, Annotated[int, Field(gt=0)]] = Field({}, description="attack to how many images it attacks")
    only: dict[Label, tuple[Label, ...]] = Field({}, description="attack to the corrections it runs on, beside none")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="of training, calibration, gates and attacks")
    device: Device = "auto"
    test_batch_size: EvalBatch = 32
    workers: Workers = 0
    resamples: int = Field(1000, gt=0, description="bootstrap resamples behind the 95 % intervals")
    short: dict[str, Any] = Field({}, description="dotted key: value, what --short overrides")

    @property
    def labels(self) -> tuple[str, ...]:
        """All models."""
        return (*self.models, *(self.trained.defences if self.trained else ()))

    @model_validator(mode="after")
    def something_to_do(self) -> Config:
        if not self.labels:
            raise UserError("there is no model to study: set models or trained")
        if len(set(self.labels)) < len(self.labels) or len(set(self.seeds)) < len(self.seeds):
            raise UserError("each label of a model, and each seed, may stand once")
        if len(set(self.sites)) < len(self.sites):
            raise UserError(f"sites: each may stand once, got {', '.join(self.sites)}")
        if "none" in self.corrections:
            raise UserError("corrections: 'none' is the model without one, and always there; take another label")
        for key in ("not_adaptive", "transfer", "subset", "only"):
            for label in getattr(self, key):
                if label not in self.attacks:
                    raise UserError(f"{key}: '{label}' is no label of attacks{nearest(label, self.attacks)}")
        if self.transfer and len(self.labels) < 2:
            raise UserError("transfer: there is one model only, and no other to attack; leave transfer out")
        for label in (*self.transfer_from, *self.transfer_from.values()):
            if label not in self.labels:
                raise UserError(f"transfer_from: '{label}' is no model{nearest(label, self.labels)}")
        for attack, wanted in self.only.items():
            for label in wanted:
                if label not in self.corrections:
                    raise UserError(f"only.{attack}: '{label}' is no correction{nearest(label, self.corrections)}")
        for label, correction in self.corrections.items():
            of = correction.of
            if of is not None and (of not in self.corrections or self.corrections[of].kind != "gate"):
                raise UserError(f"corrections.{label}: of must name a correction of kind gate, got '{of}'")
        return self

    def source_of(self, model: str) -> str:
        """Whose attacks `model` gets by transfer."""
        after = self.labels.index(model) + 1
        return self.transfer_from.get(model, self.labels[after % len(self.labels)])
