"""What `fastmat study test-time` is told."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastmat.build import DEFENCES, GUARDS, Component
from fastmat.cli.config import (
    AttackChoice,
    Data,
    Device,
    EvalBatch,
    Fields,
    Label,
    Limit,
    Mlm,
    Model,
    Number,
    OneOf,
    Section,
    Seed,
    Settings,
    TrainBatch,
    Workers,
)
from fastmat.errors import UserError, nearest

NO_GUARD = "none"
EVADING = "evading_pgd"  # the attack that belongs to a guard with a detector


class Candidate(Section):
    """A model that is guarded: with the weights that it names, or trained here."""

    model: Model = Field(description="the model; the words of the training captions are its vocabulary")
    pretrain: Settings | None = Field(None, description="plain training, from the model as it comes; null: none")
    defence: Annotated[Component | None, OneOf("defences", DEFENCES, optional=True)] = Field(
        None, description="what hardens it after that; null: nothing"
    )
    train: Settings | None = Field(None, description="how long it is hardened; needed with defence")
    batch_size: TrainBatch = 64

    @model_validator(mode="after")
    def both_or_none(self) -> Candidate:
        if (self.defence is None) != (self.train is None):
            raise UserError("defence and train belong together: set both, or neither")
        return self


class DetectorPart(Section):
    """The classifier in the frequency domain that guards with an argument `detector` get, one for every model."""

    images: int = Field(400, gt=0, description="how many training images, each clean and attacked")
    attack: AttackChoice = Field(Component(name="pgd"), description="how they are attacked, through the bare model")
    false_alarms: Number = Field(0.05, gt=0, lt=1, description="share of clean training images that it may flag")
    evading_steps: int = Field(100, gt=0, description="steps of the PGD that must not be detected")


class Config(Section):
    """`fastmat study test-time`."""

    train_data: Data = Field(description="images and captions to train models and detectors on")
    train_limit: Limit = None
    data: Data = Field(description="images and captions that are attacked")
    limit: Limit = None
    mlm: Mlm = None
    mlm_steps: int | None = Field(None, gt=0, description="train a small mlm on the training captions, for so long")
    threat: Annotated[
        dict[str, Any],
        Fields("fastmat.types:ThreatModel"),
        Field(description="the budgets; words are changed where models are hardened, never where guards are judged"),
    ] = {}  # noqa: RUF012
    models: dict[Label, Candidate] = Field(min_length=1, description="models, by label")
    guards: dict[Label, Annotated[Component, OneOf("guards", GUARDS)]] = Field(
        min_length=1, description="test-time defences, by label, each with every model"
    )
    detector: DetectorPart | None = Field(None, description="null: guards get no detector that they do not name")
    attacks: dict[Label, AttackChoice] = Field(
        min_length=1, description="attacks, by label: each made on the bare model, and through every guard"
    )
    draws: dict[Label, int] = Field(
        {}, description="of a random guard per image and step, by attack: the expectation over it (EOT); else 1"
    )
    at: Literal[1, 5, 10] = Field(1, description="K of the mean of TR@K and IR@K that verdicts go by")
    seed: Seed = 0
    device: Device = "auto"
    test_batch_size: EvalBatch = 32
    workers: Workers = 0
    resamples: int = Field(1000, gt=0, description="bootstrap resamples behind the 95 % intervals")
    short: dict[str, Any] = Field({}, description="dotted key: value, what --short overrides")

    @model_validator(mode="after")
    def known_labels(self) -> Config:
        if NO_GUARD in self.guards:
            raise UserError(f"guards: '{NO_GUARD}' is the bare model, which is always there; use another label")
        for label in (NO_GUARD, EVADING):
            if label in self.attacks:
                raise UserError(f"attacks: '{label}' is the study's own label; use another")
        for label, draws in self.draws.items():
            if label not in self.attacks:
                raise UserError(f"draws: '{label}' is no label of attacks{nearest(label, self.attacks)}")
            if draws < 1:
                raise UserError(f"draws.{label} must be at least 1, got {draws}")
        return self
