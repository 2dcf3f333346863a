"""What may stand in the config of `fastmat eval --pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from fastmat.build import EXPERTS, Component
from fastmat.cli.config import (
    AttackChoice,
    CandidateFolder,
    Data,
    Device,
    EngineSettings,
    EvalBatch,
    FitData,
    FitLimit,
    ImageCache,
    Label,
    Limit,
    Mlm,
    Model,
    Number,
    OneOf,
    Section,
    Seed,
    Shown,
    Threat,
    Workers,
)
from fastmat.errors import UserError
from fastmat.pipeline.agent import check_labels
from fastmat.pipeline.endpoint import Endpoint
from fastmat.pipeline.results import AGENT


class ExpertConfig(Section):
    """An expert and its model."""

    expert: Annotated[Component, OneOf("experts", EXPERTS)] = Field(description="what it does")
    model: Model = Field(description="what it sees with")


class ExpertsConfig(Section):
    """A pipeline: its experts by label, under which the agent calls them."""

    experts: dict[Label, ExpertConfig] = Field(min_length=1, description="experts, by label")
    defence: Label = Field("none", description="how its models were hardened, as the table shall say")


class EndpointConfig(Section):
    """The language model behind the agent, and what it is asked."""

    url: str = Field(description="base of an OpenAI-compatible API, such as http://localhost:8000/v1")
    model: str = Field(min_length=1, description="name of the language model there")
    api_key_env: str | None = Field(None, description="environment variable that holds the key; null: no key is sent")
    timeout: Number = Field(60.0, description="seconds for one answer")
    retries: int = Field(2, description="further tries where the endpoint is silent, busy or broken")
    max_steps: int = Field(6, gt=0, description="messages of the language model per picture; the last is its answer")
    question: str = Field(
        "What is in the image? Say what stands where.", min_length=1, description="asked of every picture"
    )
    images: int | None = Field(None, gt=0, description="ask about N pictures, drawn by the seed; null: all")
    again: bool = Field(
        True, description="ask about clean pictures twice: how many answers change though nothing was attacked"
    )

    @model_validator(mode="after")
    def usable(self) -> EndpointConfig:
        self.client()
        return self

    def client(self) -> Endpoint:
        return Endpoint(
            url=self.url, model=self.model, api_key_env=self.api_key_env, timeout=self.timeout, retries=self.retries
        )


class PipelineConfig(Section):
    """`fastmat eval --pipeline`."""

    pipelines: dict[Label, ExpertsConfig] = Field(
        min_length=1, description="sets of the same experts, by label; the others are compared with the first"
    )
    endpoint: EndpointConfig | None = Field(
        None, description="an agent that calls the experts, asked about each picture; null: the experts alone"
    )
    surrogates: dict[Label, Model] = Field(
        {},
        description="whose gradients are used, by label; none: each pipeline is attacked through the model of its "
        "first expert",
    )
    data: Data = Field(description="pictures; their captions are what retrieval finds and grounding is asked")
    mlm: Mlm = None
    threat: Threat = Field({})
    attacks: dict[Label, AttackChoice] = Field({}, description="attacks to run, by label")
    sets: tuple[Path, ...] = Field((), description="folders that `fastmat attack` wrote, judged as they are")
    eps: tuple[Number, ...] = Field((), description="more radii for attacks on images")
    keep_sets: bool = Field(False, description="keep the adversarial sets under sets/ when they have been judged")
    engine: EngineSettings = Field({})
    seed: Seed = 0
    device: Device = "auto"
    batch_size: EvalBatch = 32
    workers: Workers = 0
    image_cache: ImageCache = None
    candidate_cache: CandidateFolder = None
    limit: Limit = None
    fit_data: FitData = None
    fit_limit: FitLimit = None
    examples: Shown = 4
    resamples: int = Field(1000, gt=0, description="bootstrap resamples behind the 95 % intervals")

    @model_validator(mode="after")
    def comparable(self) -> PipelineConfig:
        if not self.attacks and not self.sets:
            raise UserError("nothing is attacked: name attacks, or sets that `fastmat attack` wrote")
        first, *others = self.pipelines
        wanted = {label: asked.expert for label, asked in self.pipelines[first].experts.items()}
        if AGENT in wanted:
            raise UserError(f"pipelines.{first}.experts: '{AGENT}' is what the agent is called; choose another label")
        if self.endpoint is not None:
            check_labels(wanted)
        for name in others:
            experts = {label: asked.expert for label, asked in self.pipelines[name].experts.items()}
            check_same(name, experts, first, wanted)
        return self


def check_same(name: str, experts: dict[str, Component], first: str, wanted: dict[str, Component]) -> None:
    """Raise UserError unless two pipelines have the same experts: others are no comparison."""
    for label in wanted:
        if label not in experts:
            raise UserError(
                f"pipelines.{name}.experts: '{label}' of {first} is missing; give all pipelines the same experts"
            )
    for label, expert in experts.items():
        if label not in wanted:
            raise UserError(f"pipelines.{name}.experts: '{label}' is missing in {first}; add it there, or remove it")
        if expert != wanted[label]:
            raise UserError(
                f"pipelines.{name}.experts.{label}.expert: is set otherwise than in {first}; only models may differ"
            )
