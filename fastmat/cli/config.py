"""What may stand in a config file: one frozen pydantic model per command, unknown keys refused.

Paths are relative to the working directory; every float may be written as a fraction (`2/255`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from fastmat.build import (
    ATTACKS,
    CANDIDATES,
    DATASETS,
    DEFENCES,
    GENERATORS,
    MODELS,
    TASKS,
    TRAINING_SETS,
    TRUTHS,
    Component,
    construct,
    locate,
    number,
    parse,
)
from fastmat.errors import UserError, nearest
from fastmat.evaluation.rerank import Rerank


class Section(BaseModel):
    """A group of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def known_keys(cls, data: Any) -> Any:
        """An unknown key is answered with the nearest known one."""
        for key in data if isinstance(data, Mapping) else ():
            if key not in cls.model_fields:
                raise UserError(f"unknown key '{key}'{nearest(str(key), cls.model_fields)}")
        return data


@dataclass(frozen=True, eq=False)
class OneOf:
    """Marks a component out of `registry`, called `title` in the help; name and arguments are checked."""

    title: str
    registry: Mapping[str, str]
    optional: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)

    def read(self, value: Any) -> Component | None:
        if value is None and self.optional:
            return None
        return value if isinstance(value, Component) else parse(value, self.registry, where="")


@dataclass(frozen=True, eq=False)
class Fields:
    """Marks the fields of one dataclass ("module:name"), which checks them; the help lists them."""

    factory: str
    optional: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)

    def read(self, value: Any) -> dict[str, Any] | None:
        if value is None and self.optional:
            return None
        if not isinstance(value, Mapping):
            raise UserError(f"expected {{key: value}}, got {value!r}")
        arguments = {str(key): item for key, item in value.items()}
        construct(locate(self.factory), arguments, where="")
        return arguments


Number = Annotated[float, BeforeValidator(number)]
Label = Annotated[str, Field(pattern=r"^[\w.+-]+$")]
Model = Annotated[Component, OneOf("models", MODELS)]
Data = Annotated[Component, OneOf("data sets", DATASETS)]
TrainingData = Annotated[Component, OneOf("data sets", TRAINING_SETS)]
AttackChoice = Annotated[Component, OneOf("attacks", ATTACKS)]
DefenceChoice = Annotated[Component, OneOf("defences", DEFENCES)]
TrackerName = Literal["auto", "tensorboard", "wandb", "none"]
Settings = Annotated[dict[str, Any], Fields("fastmat.training.settings:TrainSettings")]

CandidateChoice = Annotated[Component, OneOf("candidate sources", CANDIDATES)]

# Keys that several commands have.
Threat = Annotated[dict[str, Any], Fields("fastmat.types:ThreatModel"), Field(description="the budgets of the attack")]
EngineSettings = Annotated[
    dict[str, Any], Fields("fastmat.attacks.engine:Engine"), Field(description="how attacks are executed")
]
Augmentation = Annotated[
    dict[str, Any],
    Fields("fastmat.augment.augmentation:AugmentSettings"),
    Field(description="MAT+: more captions and views per image, drawn anew every step"),
]
Mlm = Annotated[
    str | None, Field(description="a transformers BertForMaskedLM, folder or hub id; attacks on words need it")
]
FitData = Annotated[
    Component | None,
    OneOf("data sets", DATASETS, optional=True),
    Field(description="images and captions that an attack such as universal is fitted to, not those it is judged on"),
]
Teacher = Annotated[
    Component | None,
    OneOf("models", MODELS, optional=True),
    Field(description="the frozen original that defences such as fare keep to; null: the model before training"),
]
TeacherFolder = Annotated[
    Path | None,
    Field(description="folder for what the teacher makes of the training images: computed once, read after that"),
]
Adapters = Annotated[
    dict[str, Any] | None,
    Fields("fastmat.models.adapters:AdapterSettings", optional=True),
    Field(description="train low-rank adapters in place of the weights; the weights written have them added"),
]
Matching = Annotated[
    dict[str, Any] | None,
    Fields("fastmat.defences.matching:MatchingSettings", optional=True),
    Field(description="a fusion model (albef, blip): contrast with momentum encoders and a queue, matching beside it"),
]
Seed = Annotated[int, Field(ge=0, description="of every random draw")]
Device = Annotated[str, Field(description="auto (a GPU when there is one), cpu, cuda or cuda:N")]
EvalBatch = Annotated[int, Field(gt=0, description="images at a time; changes no result")]
TrainBatch = Annotated[int, Field(gt=0, description="images per step, all processes together")]
Captions = Annotated[int, Field(gt=0, description="captions drawn per image and step")]
Workers = Annotated[int, Field(ge=0, description="processes that decode images")]
ImageCache = Annotated[Path | None, Field(description="folder for decoded images: decoded once, read after that")]
CandidateFolder = Annotated[
    Path | None, Field(description="folder for what the mlm proposes: computed once, read after that")
]
Limit = Annotated[int | None, Field(gt=0, description="use the first N images only")]
FitLimit = Annotated[int | None, Field(gt=0, description="use the first N images of fit_data only")]
Shown = Annotated[int, Field(ge=0, description="images in the report's gallery")]


class AttackConfig(Section):
    """`fastmat attack`."""

    model: Model = Field(description="the surrogate, whose gradients are used")
    data: Data = Field(description="images and captions to attack")
    mlm: Mlm = None
    threat: Threat = {}
    attack: AttackChoice = Field(description="the attack")
    engine: EngineSettings = {}
    seed: Seed = 0
    device: Device = "auto"
    batch_size: EvalBatch = 32
    workers: Workers = 0
    image_cache: ImageCache = None
    candidate_cache: CandidateFolder = None
    limit: Limit = None
    fit_data: FitData = None
    fit_limit: FitLimit = None
    shard_size: int = Field(256, gt=0, description="images per file of the adversarial set")


class ValidationConfig(Section):
    """Robust validation during training."""

    data: Data = Field(description="images and captions that are not trained on")
    images: int = Field(100, gt=0, description="how many, drawn by the seed; they and their captions are the gallery")
    every: int = Field(1, gt=0, description="judge every N-th checkpoint; the last one always")
    attack: AttackChoice = Field(Component(name="pgd"), description="the attack")
    threat: Annotated[
        dict[str, Any],
        Fields("fastmat.types:ThreatModel"),
        Field(description="the budgets of the attack; those of the run where it is left out"),
    ] = {}
    batch_size: EvalBatch = 32


class TrainConfig(Section):
    """`fastmat train`."""

    model: Model = Field(description="where training starts")
    data: TrainingData = Field(description="training images and captions")
    mlm: Mlm = None
    threat: Threat = {}
    defence: DefenceChoice = Field(description="the defence")
    teacher: Teacher = None
    teacher_cache: TeacherFolder = None
    matching: Matching = None
    adapters: Adapters = None
    train: Settings = Field(description="steps, optimiser, precision, checkpoints; its seed is the run's by default")
    seed: Seed = 0
    batch_size: TrainBatch = 128
    captions_per_image: Captions = 1
    augment: Augmentation = {}
    validation: ValidationConfig | None = Field(
        None, description="judge checkpoints as they are saved, and keep the most robust one; null: do not"
    )
    tracker: TrackerName = Field(
        "auto", description="where log.jsonl shows as well, in DIR/trackers; auto: TensorBoard where it is installed"
    )
    workers: Workers = 0
    candidate_cache: CandidateFolder = None
    limit: Limit = None


class Victim(Section):
    """A model to judge."""

    model: Model = Field(description="the model")
    defence: Label = Field("none", description="how it was hardened, as the table shall say")
    rerank_k: int | None = Field(
        None, gt=0, description="candidates per query that the matching head puts in order; null: rank by cosine alone"
    )
    rerank_cosine: bool | None = Field(
        None, description="score by matching logit plus cosine; null: as published, blip does and albef does not"
    )

    def rerank(self) -> Rerank | None:
        """The second stage, if there is one."""
        return None if self.rerank_k is None else Rerank(k=self.rerank_k, plus_cosine=self.rerank_cosine)


class EvalConfig(Section):
    """`fastmat eval`."""

    victims: dict[Label, Victim] = Field(min_length=1, description="models to judge, one by one, by label")
    surrogates: dict[Label, Model] = Field(
        {},
        description="whose gradients are used, by label: every attack is run once on each and judged on all victims; "
        "none: each victim is attacked through its own",
    )
    data: Data = Field(description="images and captions to rank")
    mlm: Mlm = None
    threat: Threat = {}
    attacks: dict[Label, AttackChoice] = Field(
        {}, description="attacks to run, by label; the last one on all images is illustrated"
    )
    subset: dict[Label, Annotated[int, Field(gt=0)]] = Field(
        {},
        description="for attacks too slow for all images, by label: how many images, drawn by the seed, are attacked "
        "with their captions; they query the whole gallery, whose other entries stay clean",
    )
    sets: tuple[Path, ...] = Field((), description="folders that `fastmat attack` wrote, judged as they are")
    truths: dict[Label, Annotated[Component, OneOf("ground truths", TRUTHS)]] = Field(
        {},
        description="more ground truths, by label: every row has its figures under each as well, with R-precision and "
        "mAP@R, and those of the original pairs for the same queries; attacks know the original pairs alone",
    )
    eps: tuple[Number, ...] = Field((), description="more radii for attacks on images: the robustness curve")
    keep_sets: bool = Field(False, description="keep the adversarial sets under sets/ when they have been judged")
    engine: EngineSettings = {}
    seed: Seed = 0
    device: Device = "auto"
    batch_size: EvalBatch = 32
    workers: Workers = 0
    image_cache: ImageCache = None
    candidate_cache: CandidateFolder = None
    limit: Limit = None
    fit_data: FitData = None
    fit_limit: FitLimit = None
    examples: Shown = 8
    resamples: int = Field(1000, gt=0, description="bootstrap resamples behind the 95 % intervals")

    @model_validator(mode="after")
    def subset_of_attacks(self) -> EvalConfig:
        for label in self.subset:
            if label not in self.attacks:
                raise UserError(f"subset: '{label}' is no label of attacks{nearest(label, self.attacks)}")
        return self


class TaskVictim(Section):
    """A model to judge on a task."""

    model: Model = Field(description="the model")
    defence: Label = Field("none", description="how it was hardened, as the table shall say")


class TaskConfig(Section):
    """`fastmat task`."""

    task: Annotated[Component, OneOf("tasks", TASKS)] = Field(description="the task, with its data")
    victims: dict[Label, TaskVictim] = Field(min_length=1, description="models to judge, one by one, by label")
    surrogates: dict[Label, Model] = Field(
        {}, description="whose gradients are used, by label; none: each victim is attacked through its own"
    )
    mlm: Mlm = None
    threat: Threat = {}
    attacks: dict[Label, AttackChoice] = Field({}, description="attacks to run, by label")
    eps: tuple[Number, ...] = Field((), description="more radii for attacks on images")
    keep_sets: bool = Field(False, description="keep the adversarial sets under sets/ when they have been judged")
    engine: EngineSettings = {}
    seed: Seed = 0
    device: Device = "auto"
    batch_size: EvalBatch = 32
    workers: Workers = 0
    image_cache: ImageCache = None
    candidate_cache: CandidateFolder = None
    limit: Annotated[
        int | None, Field(gt=0, description="use the first N rows only: pairs, or a captioner's images")
    ] = None
    fit_data: FitData = None
    fit_limit: FitLimit = None
    examples: Annotated[int, Field(ge=0, description="rows in the report's gallery")] = 4
    resamples: int = Field(1000, gt=0, description="bootstrap resamples behind the 95 % intervals")


class CandidatesConfig(Section):
    """`fastmat candidates`: what decides candidates has the names and defaults that attacks have."""

    data: Data = Field(description="whose captions")
    mlm: Mlm = None
    candidates: CandidateChoice = Field(Component(name="masked"), description="how substitutes are proposed")
    parity: Literal["correct", "official"] = Field("correct", description="that of the attacks that will read them")
    quirks: Annotated[dict[str, Any], Fields("fastmat.quirks:Quirks")] = Field(
        {}, description="theirs, on top of parity; the official co_attack and sep also have text_max_length: 30"
    )
    candidate_cache: CandidateFolder = None
    device: Device = "auto"
    limit: Limit = None


class AugmentConfig(Section):
    """`fastmat augment`."""

    data: Data = Field(description="images and captions to augment; with --report an augmented set")
    generator: Annotated[Component | None, OneOf("generators", GENERATORS, optional=True)] = Field(
        None, description="what makes captions or images; --with names it"
    )
    copies: int = Field(
        1, gt=0, description="results asked for per caption, or per image where a generator reads those"
    )
    model: Annotated[Component | None, OneOf("models", MODELS, optional=True)] = Field(
        None, description="with --report: whose features are measured"
    )
    seed: Seed = 0
    device: Device = "auto"
    batch_size: int = Field(
        32, gt=0, description="requests or images at a time; samples of a language model depend on it"
    )
    limit: Limit = None
    resamples: int = Field(1000, gt=0, description="bootstrap resamples behind the 95 % intervals")


class ExportConfig(Section):
    """`fastmat export`: the clean images of a set; what is not given is what the set was made of."""

    data: Data = Field(description="the images and captions that were attacked")
    limit: Limit = None
    rows: tuple[int, ...] | None = Field(None, description="those attacked, where not all were")
    batch_size: EvalBatch = 32
    workers: Workers = 0


class PackConfig(Section):
    """`fastmat pack`."""

    data: Data = Field(description="images and captions to pack")
    limit: Limit = None


class Harden(Section):
    """The quickstart's defences, which share start, steps and optimiser."""

    train: Settings = Field(description="steps, optimiser, precision: the same for every defence")
    defences: dict[Label, DefenceChoice] = Field(min_length=1, description="defences, by label")


class QuickstartConfig(Section):
    """`fastmat quickstart`: train a masked language model and a small dual encoder, harden it, judge all."""

    model: Model = Field(description="the dual encoder; the words of the training captions are its vocabulary")
    seed: Seed = 0
    mlm_steps: int = Field(gt=0, description="training steps of the masked language model")
    batch_size: TrainBatch = 128
    captions_per_image: Captions = 1
    pretrain: Settings = Field(description="plain training from random weights")
    harden: Harden = Field(description="what follows, for every defence from the same pre-trained weights")
    threat: Threat = {}
    choose_eps: tuple[Number, ...] = Field(min_length=1, description="radii to choose from, ascending")
    choose_by: Label = Field(description="the attack that chooses, a label of attacks")
    choose_on: Label = Field(description="the model it is chosen on, a label of harden.defences")
    broken_below: Number = Field(description="the first radius at which validation TR@1 is at most this is taken")
    validation_images: int = Field(gt=0, description="images of the validation split used for the choice")
    test_images: Limit = None
    attacks: dict[Label, AttackChoice] = Field(min_length=1, description="attacks on the test split, by label")
    curve: tuple[Number, ...] = Field((), description="more radii on the test split, for the robustness curve")
    examples: Shown = 8
    short: dict[str, Any] = Field({}, description="dotted key: value, what --short overrides")
