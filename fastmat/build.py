"""From names and arguments to objects: the one place that knows concrete classes.

To add a component, write its file and one line in a registry here; its arguments, their types and their defaults are
those of its constructor. Config objects end here: classes receive plain values.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from fastmat.attacks.base import Attack
from fastmat.attacks.objectives import Objective
from fastmat.data.loader import TrainingBatches
from fastmat.data.retrieval import RetrievalSet, read_retrieval_set
from fastmat.data.shards import ShardBatches, ShardSet
from fastmat.defences.base import Defence
from fastmat.defences.inner import TextSearch
from fastmat.errors import UserError, nearest
from fastmat.guards.base import Guard
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.text.candidates import CandidateSource
from fastmat.types import ImageTransform, ThreatModel

if typing.TYPE_CHECKING:
    from fastmat.augment.augmentation import Augment
    from fastmat.data.truth import Truth
    from fastmat.defences.teacher_cache import TeacherCache
    from fastmat.pipeline.base import Expert
    from fastmat.tasks.base import Task
    from fastmat.text.candidate_cache import CandidateCache
    from fastmat.text.mlm import MaskedLanguageModel

# Names, not imports: a run that attacks with PGD does not wait for the libraries of every other component.
MODELS = {
    "open_clip": "fastmat.models.open_clip:load_open_clip",
    "hf_clip": "fastmat.models.hf_clip:load_hf_clip",
    "small": "fastmat.models.small:small_clip",
    "tiny": "fastmat.models.tiny:tiny_clip",
    "small_fusion": "fastmat.models.small_fusion:small_fusion",
    "fused_clip": "fastmat.models.fused_clip:fused_clip",
    "albef": "fastmat.models.albef:load_albef",
    "blip": "fastmat.models.blip:load_blip",
    "tiny_albef": "fastmat.models.tiny_fusion:tiny_albef",
    "tiny_blip": "fastmat.models.tiny_fusion:tiny_blip",
    "albef_ve": "fastmat.models.albef_ve:load_albef_ve",
    "blip_captioner": "fastmat.models.blip_captioner:load_blip_captioner",
    "tiny_albef_ve": "fastmat.models.tiny_fusion:tiny_albef_ve",
    "guarded": "fastmat.guards.guarded:Guarded",
}
ATTACKS = {
    "pgd": "fastmat.attacks.pgd:PGD",
    "mi_fgsm": "fastmat.attacks.mi_fgsm:MIFGSM",
    "apgd": "fastmat.attacks.apgd:APGD",
    "apgd_classes": "fastmat.attacks.apgd_classes:APGDClasses",
    "square": "fastmat.attacks.square:Square",
    "bert_attack": "fastmat.attacks.bert_attack:BertAttack",
    "sep": "fastmat.attacks.sep:SepAttack",
    "co_attack": "fastmat.attacks.co_attack:CoAttack",
    "sga": "fastmat.attacks.sga:SGA",
    "cmi": "fastmat.attacks.cmi:CMI",
    "dra": "fastmat.attacks.dra:DRA",
    "sa_aet": "fastmat.attacks.sa_aet:SAAET",
    "universal": "fastmat.attacks.universal:Universal",
    "alternating": "fastmat.attacks.alternating:Alternating",
    "strongest": "fastmat.attacks.strongest:Strongest",
    "corruption": "fastmat.perturbations.corruption:Corruption",
    "stylize": "fastmat.perturbations.stylize:Stylize",
    "text_perturbation": "fastmat.perturbations.text:TextPerturbation",
}
OBJECTIVES = {
    "contrastive": "fastmat.attacks.objectives:Contrastive",
    "margin": "fastmat.attacks.margin:Margin",
    "dlr": "fastmat.attacks.dlr:DLR",
    "cosine": "fastmat.attacks.objectives:CosineToOwn",
    "kl": "fastmat.attacks.objectives:KLFromClean",
    "kl_fused": "fastmat.attacks.fusion:KLFusedFromClean",
    "itm": "fastmat.attacks.matching:ITM",
    "itc_itm": "fastmat.attacks.matching:ITCAndITM",
    "target": "fastmat.attacks.target:Target",
    "rivals": "fastmat.attacks.rivals:Rivals",
    "squared_l2": "fastmat.attacks.objectives:SquaredL2FromClean",
    "kl_entailment": "fastmat.attacks.entailment:KLEntailment",
    "caption_loss": "fastmat.attacks.caption_loss:CaptionLoss",
}
DEFENCES = {
    "finetune": "fastmat.defences.finetune:FineTune",
    "tecoa": "fastmat.defences.tecoa:TeCoA",
    "tecoa_itr": "fastmat.defences.tecoa_itr:TeCoAITR",
    "fare": "fastmat.defences.fare:FARE",
    "mat": "fastmat.defences.mat:MAT",
    "mmcoa": "fastmat.defences.mmcoa:MMCoA",
    "pmg_aft": "fastmat.defences.pmg_aft:PMGAFT",
    "sim_clip": "fastmat.defences.sim_clip:SimCLIP",
    "tga_zsr": "fastmat.defences.tga_zsr:TGAZSR",
}
GENERATORS = {
    "eda": "fastmat.augment.eda:EDA",
    "back_translation": "fastmat.augment.back_translation:BackTranslation",
    "rewrite": "fastmat.augment.rewrite:Rewrite",
    "caption": "fastmat.augment.captioning:Captioning",
    "text_to_image": "fastmat.augment.text_to_image:TextToImage",
    "jsonl": "fastmat.augment.jsonl:JsonLines",
    "function": "fastmat.augment.function:Function",
}
CANDIDATES = {
    "masked": "fastmat.text.masked:MaskedCandidates",
    "lexicon": "fastmat.text.lexicon:Lexicon",
    "neighbours": "fastmat.text.neighbours:Neighbours",
    "characters": "fastmat.text.characters:Characters",
}
TEXT_SEARCHES = {
    "word_substitution": "fastmat.attacks.word_substitution:WordSubstitution",
    "embedding_space": "fastmat.defences.embedding_space:EmbeddingSpace",
}
DATASETS = {
    "json": "fastmat.build:json_set",
    "digits": "fastmat.data.digits:digits_set",
    "image_folder": "fastmat.data.labelled:image_folder",
    "labelled_digits": "fastmat.data.labelled:labelled_digits",
    "torchvision": "fastmat.data.torchvision_sets:torchvision_set",
}
GUARDS = {
    "jpeg": "fastmat.guards.jpeg:JPEG",
    "resize_pad": "fastmat.guards.resize_pad:ResizePad",
    "frequency_masking": "fastmat.guards.frequency_masking:FrequencyMasking",
    "ttc": "fastmat.guards.ttc:TTC",
}
# Other ground truths than the pairs that a set comes with.
TRUTHS = {
    "same_captions": "fastmat.data.truth:same_captions",
    "eccv_caption": "fastmat.data.eccv_caption:read_eccv_caption",
    "cxc": "fastmat.data.cxc:read_cxc",
}
TASKS = {
    "grounding": "fastmat.tasks.grounding:Grounding",
    "captioning": "fastmat.tasks.captioning:Captioning",
    "entailment": "fastmat.tasks.entailment:Entailment",
    "zero_shot": "fastmat.tasks.zero_shot:ZeroShot",
}
EXPERTS = {
    "retrieval": "fastmat.pipeline.retrieval:Retrieval",
    "tagging": "fastmat.pipeline.tagging:Tagging",
    "captioning": "fastmat.pipeline.captioning:Captioning",
    "grounding": "fastmat.pipeline.grounding:Grounding",
}
# Streamed, for sets that do not fit in memory: training reads them too, nothing else does.
TRAINING_SETS = {**DATASETS, "shards": "fastmat.data.shards:open_shards"}

# Where pydantic speaks of classes and patterns.
PLAINER = {
    "path_type": "input should be a path",
    "string_pattern_mismatch": "a label may hold letters, digits and . + - _ only",
}

# A parameter of one of these types is itself a component.
SEAMS: dict[type, Mapping[str, str]] = {
    Objective: OBJECTIVES,
    TextSearch: TEXT_SEARCHES,
    CandidateSource: CANDIDATES,
    VisionLanguageModel: MODELS,  # of a model inside a model
    Guard: GUARDS,
    RetrievalSet: DATASETS,
}
Given = Mapping[str, Callable[[], object]]
# Made from other sections, so no argument of a component: `max_words` stands in `threat`, with the rest of the budget.
RESERVED = frozenset(
    {
        "threat",
        "max_words",
        "mlm",
        "candidate_cache",
        "teacher",
        "teacher_cache",
        "prompts",
        "quirks",
        "vlm",
        "gallery",
        "dataset",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """A name out of a registry and the arguments of its constructor."""

    name: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, value: object, registry: Mapping[str, str]) -> Component:
        """From `sga` or `{name: sga, steps: 10}`. Raises UserError on a name that `registry` lacks."""
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise UserError(f"expected a name or {{name: ..., argument: ...}}, got {value!r}")
        if value["name"] not in registry:
            raise UserError(f"unknown name '{value['name']}'{nearest(value['name'], registry)}")
        return cls(name=value["name"], arguments={str(k): item for k, item in value.items() if k != "name"})

    def plain(self) -> dict[str, Any]:
        """As it stands in a config file."""
        return {"name": self.name, **self.arguments}


def at(where: str, message: object) -> UserError:
    return UserError(f"{where}: {message}" if where else str(message))


def locate(path: str) -> Callable[..., Any]:
    """The class or function at "module:name"."""
    module, name = path.split(":")
    return typing.cast("Callable[..., Any]", getattr(import_module(module), name))


def parameters_of(factory: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (annotation, default) of what a config may set; the default is `inspect.Parameter.empty` if required."""
    hints = typing.get_type_hints(factory.__init__ if isinstance(factory, type) else factory)  # type: ignore[misc]
    signature = inspect.signature(factory).parameters
    return {name: (hints[name], signature[name].default) for name in signature if name not in reserved(factory)}


def reserved(factory: Callable[..., Any]) -> frozenset[str]:
    """The threat model and the quirks are the two settings whose own fields a config does set."""
    return frozenset() if factory in (ThreatModel, Quirks) else RESERVED


def check(factory: Callable[..., Any], arguments: Mapping[str, Any], *, where: str) -> None:
    """Raise UserError on unknown names and on values of another type; nothing is loaded."""
    convert(factory, arguments, where=where, given=None)


def construct(
    factory: Callable[..., Any], arguments: Mapping[str, Any], *, where: str, given: Given | None = None
) -> Any:
    """Call `factory` with `arguments`, checked and converted by its own signature.

    given: makes what other sections describe (the threat model, the masked language model, ...), called only when the
        factory has a parameter of that name. where: the section's name, for errors.

    Raises UserError on unknown or missing arguments and on values of another type.
    """
    given = given or {}
    values = convert(factory, arguments, where=where, given=given)
    signature = inspect.signature(factory).parameters
    for name, parameter in signature.items():
        if name in values:
            continue
        if name in given:
            values[name] = given[name]()
        elif parameter.default is inspect.Parameter.empty:
            raise at(where, f"'{name}' is missing")
    try:
        return factory(**values)
    except UserError as error:
        raise at(where, error) from error
    except (ValueError, AssertionError, RuntimeError) as error:  # a library's, on values that it alone can judge
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise at(where, f"{factory.__name__} refuses these arguments ({reason})") from error


def convert(
    factory: Callable[..., Any], arguments: Mapping[str, Any], *, where: str, given: Given | None
) -> dict[str, Any]:
    """`arguments` as `factory` wants them; without `given`, components inside are checked and not made."""
    known = parameters_of(factory)
    values = {}
    for name, value in arguments.items():
        if name in reserved(factory):
            section = "threat" if name == "max_words" else name
            raise at(where, f"'{name}' is not set here but in '{section}'")
        if name not in known:
            raise at(where, f"unknown key '{name}'{nearest(name, known)}")
        values[name] = converted(value, known[name][0], where=f"{where}.{name}".lstrip("."), given=given)
    return values


def converted(value: Any, annotation: Any, *, where: str, given: Given | None) -> Any:
    """Components and settings are built, fractions read, everything else is pydantic's."""
    kinds = [kind for kind in (annotation, *typing.get_args(annotation)) if isinstance(kind, type)]
    seam = next((SEAMS[kind] for kind in kinds if kind in SEAMS), None)
    if seam is not None and value is not None:
        component = parse(value, seam, where=where)
        if given is None:
            return component
        if seam is MODELS:
            return build_model(component, where=where)
        return build(seam, component, where=where, given=given)
    adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        try:
            return adapter.validate_python(numbers(value))
        except UserError as fraction:
            raise at(where, fraction) from error
        except ValidationError:
            raise at(where, sentence(error)) from error


def parse(value: object, registry: Mapping[str, str], *, where: str) -> Component:
    """A component whose name and arguments have been checked."""
    try:
        component = Component.parse(value, registry)
    except UserError as error:
        raise at(where, error) from error
    arguments = dict(component.arguments)
    if registry is MODELS:
        arguments.pop("weights", None)
    if registry is ATTACKS or registry is DEFENCES:
        arguments, _ = split_quirks(arguments, where=where)
    check(locate(registry[component.name]), arguments, where=where)
    return component


def sentence(error: ValidationError) -> str:
    """pydantic's first complaint, in one line."""
    first = error.errors()[0]
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, UserError):
        return str(inner)
    if first["type"] == "missing":
        return "this key is required; set it"
    said = PLAINER.get(first["type"], first["msg"][:1].lower() + first["msg"][1:])
    return f"{said}, got {first['input']!r}"


def number(value: Any) -> Any:
    """A fraction such as "2/255" as a float; anything else as it is."""
    match = re.fullmatch(r"\s*([-+\d.eE]+)\s*/\s*([\d.eE]+)\s*", value) if isinstance(value, str) else None
    if match is None:
        return value
    try:
        return float(match[1]) / float(match[2])
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"'{value}' is not a fraction") from error


def numbers(value: Any) -> Any:
    """`number` on everything inside."""
    if isinstance(value, Mapping):
        return {key: numbers(item) for key, item in value.items()}
    return [numbers(item) for item in value] if isinstance(value, list | tuple) else number(value)


def build(registry: Mapping[str, str], component: Component, *, where: str, given: Given | None = None) -> Any:
    """The component, made by the factory that `registry` names."""
    return construct(locate(registry[component.name]), component.arguments, where=where, given=given)


def build_threat(arguments: Mapping[str, Any], *, where: str = "threat") -> ThreatModel:
    return typing.cast("ThreatModel", construct(ThreatModel, arguments, where=where))


def build_model(
    component: Component, *, where: str = "model", device: torch.device | str = "cpu"
) -> VisionLanguageModel:
    """A model in eval mode; `weights: FILE` loads weights that fastmat saved on top of any of them."""
    arguments = dict(component.arguments)
    weights = arguments.pop("weights", None)
    model = construct(locate(MODELS[component.name]), arguments, where=where)
    if weights is not None:
        from fastmat.models.weights import load_weights

        load_weights(model, Path(weights))
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise at(where, f"its weights are NaN or infinite in '{name}'; take a checkpoint from before that")
    return typing.cast("VisionLanguageModel", model.to(device).eval())


def check_weights(component: Component, *, where: str) -> None:
    """Raise UserError when a model's `weights` file is missing: at once, not when its turn comes."""
    weights = component.arguments.get("weights")
    if weights is not None and not Path(weights).is_file():
        raise at(where, f"weights file {weights} does not exist")
    if isinstance(inner := component.arguments.get("model"), Mapping):
        check_weights(parse(inner, MODELS, where=f"{where}.model"), where=f"{where}.model")


def build_mlm(folder: str | None, *, device: torch.device | str = "cpu") -> MaskedLanguageModel:
    """The masked language model behind every text attack. Raises UserError when there is none."""
    from fastmat.text.mlm import MaskedLanguageModel

    if folder is None:
        raise UserError(
            "words are to be substituted: set mlm to a transformers BertForMaskedLM, as google-bert/bert-base-uncased"
        )
    return MaskedLanguageModel.load(folder).to(device)


def build_attack(
    component: Component,
    *,
    threat: ThreatModel,
    mlm: Callable[[], object],
    seed: int,
    candidate_cache: CandidateCache | Path | None = None,
    where: str = "attack",
) -> Attack:
    """An attack; `parity: official` sets every published quirk, `quirks: {...}` single ones on top.

    mlm: loads the masked language model, called only by an attack on words. candidate_cache: where its candidates
    are kept.
    """
    factory = locate(ATTACKS[component.name])
    official = typing.cast("type[Attack]", factory).official
    arguments, quirks = split_quirks(component.arguments, where=where, official=official)
    given = given_of(threat=threat, mlm=mlm, quirks=quirks, seed=seed, candidate_cache=candidate_cache)
    return typing.cast("Attack", construct(factory, arguments, where=where, given=given))


def build_defence(
    component: Component,
    *,
    teacher: VisionLanguageModel,
    threat: ThreatModel,
    mlm: Callable[[], object],
    seed: int,
    candidate_cache: CandidateCache | Path | None = None,
    prompts: Callable[[], object] = lambda: None,
    teacher_cache: TeacherCache | None = None,
    where: str = "defence",
) -> Defence:
    """A defence; teacher: the model before training, of which a defence that needs one keeps a frozen copy.

    teacher_cache: that copy's embeddings of clean images; a defence that reads none refuses it.
    prompts: makes the prompts of every class (`fastmat.data.labelled.class_prompts`), None where there are no labels.
    """
    arguments, quirks = split_quirks(component.arguments, where=where)
    parts = given_of(threat=threat, mlm=mlm, quirks=quirks, seed=seed, candidate_cache=candidate_cache)
    given = {"teacher": lambda: teacher, "prompts": prompts, "teacher_cache": lambda: teacher_cache, **parts}
    factory = locate(DEFENCES[component.name])
    if teacher_cache is not None and "teacher_cache" not in inspect.signature(factory).parameters:
        raise at(
            where,
            f"{component.name} compares nothing with a teacher's embeddings of clean images; leave out teacher_cache",
        )
    return typing.cast("Defence", construct(factory, arguments, where=where, given=given))


def build_matching(
    arguments: Mapping[str, Any], defence: Defence, model: VisionLanguageModel, *, seed: int, where: str = "matching"
) -> Defence:
    """`defence` with contrast and matching of a fusion model, `model`, in place of its contrastive terms."""
    from fastmat.defences.matching import Matching, MatchingSettings

    settings = construct(MatchingSettings, arguments, where=where)
    try:
        return Matching(defence=defence, model=model, settings=settings, seed=seed)
    except UserError as error:
        raise at(where, error) from error


def given_of(
    *,
    threat: ThreatModel,
    mlm: Callable[[], object],
    quirks: Quirks,
    seed: int,
    candidate_cache: CandidateCache | Path | None,
) -> Given:
    """What every part of an attack may ask for."""
    given: dict[str, Callable[[], object]] = {
        "threat": lambda: threat,
        "max_words": lambda: threat.max_words,
        "mlm": mlm,
        "candidate_cache": lambda: candidate_cache,
        "quirks": lambda: quirks,
        "seed": lambda: seed,
    }
    masked, substitution = Component(name="masked"), Component(name="word_substitution")
    given["candidates"] = lambda: build(CANDIDATES, masked, where="candidates", given=given)
    given["text_search"] = lambda: build(TEXT_SEARCHES, substitution, where="text_search", given=given)
    return given


def split_quirks(
    arguments: Mapping[str, Any], *, where: str, official: Quirks | None = None
) -> tuple[dict[str, Any], Quirks]:
    """The arguments of an attack without `parity` and `quirks`, and the quirks that these two describe.

    official: what `parity: official` means; default: `Quirks.official()`.
    """
    rest = dict(arguments)
    parity, changes = rest.pop("parity", "correct"), rest.pop("quirks", {})
    if parity not in ("correct", "official"):
        raise at(where, f"parity must be 'correct' or 'official', got {parity!r}")
    if not isinstance(changes, Mapping):
        raise at(where, f"quirks must be {{name: value}}, got {changes!r}")
    preset = (official or Quirks.official()) if parity == "official" else Quirks()
    return rest, preset.but(**convert(Quirks, changes, where=f"{where}.quirks".lstrip("."), given={}))


def build_data(component: Component, *, limit: int | None = None, where: str = "data") -> RetrievalSet:
    """A retrieval set, its first `limit` images."""
    return typing.cast("RetrievalSet", _first(build(DATASETS, component, where=where), limit))


def build_truths(components: Mapping[str, Component], dataset: RetrievalSet) -> dict[str, Truth]:
    """Ground truths of `dataset` by label, each beside the original pairs of the same queries."""
    from fastmat.data.truth import beside_pairs

    given: Given = {"dataset": lambda: dataset}
    made = {
        label: build(TRUTHS, component, where=f"truths.{label}", given=given) for label, component in components.items()
    }
    return beside_pairs(dataset, made)


def build_task(component: Component, *, where: str = "task") -> Task:
    """A task with its data."""
    return typing.cast("Task", build(TASKS, component, where=where))


def build_expert(
    component: Component, *, vlm: VisionLanguageModel, gallery: tuple[str, ...], where: str = "expert"
) -> Expert:
    """An expert that sees with `vlm`; gallery: the captions of the data."""
    given: Given = {"vlm": lambda: vlm, "gallery": lambda: gallery}
    return typing.cast("Expert", build(EXPERTS, component, where=where, given=given))


def build_training_data(
    component: Component, *, limit: int | None = None, where: str = "data"
) -> RetrievalSet | ShardSet:
    """What `build_batches` draws from, its first `limit` images."""
    return _first(build(TRAINING_SETS, component, where=where), limit)


def _first(dataset: RetrievalSet | ShardSet, limit: int | None) -> RetrievalSet | ShardSet:
    try:
        return dataset if limit is None else dataset.take(limit)
    except UserError as error:
        raise at("limit", error) from error


def build_batches(
    dataset: RetrievalSet | ShardSet,
    transform: ImageTransform,
    *,
    batch_size: int,
    captions_per_image: int,
    seed: int,
    workers: int,
) -> TrainingBatches | ShardBatches:
    """The training batches of a set in memory or in shards."""
    source = ShardBatches if isinstance(dataset, ShardSet) else TrainingBatches
    return source(
        dataset,  # type: ignore[arg-type]  # the one that fits
        transform,
        batch_size=batch_size,
        captions_per_image=captions_per_image,
        seed=seed,
        workers=workers,
    )


def build_augmentation(
    arguments: Mapping[str, Any], dataset: RetrievalSet | ShardSet, *, where: str = "augment"
) -> Augment | None:
    """What adds captions and views to every batch; None where `arguments` ask for nothing."""
    from fastmat.augment.augmentation import AugmentSettings, augmentation

    settings = construct(AugmentSettings, arguments, where=where)
    try:
        return augmentation(settings, dataset if isinstance(dataset, RetrievalSet) else None)
    except UserError as error:
        raise at(where, error) from error


def json_set(
    *,
    annotations: Path,
    images: Path,
    title: str,
    split: str,
    captions: typing.Literal["none", "albef", "blip"] = "none",
) -> RetrievalSet:
    """A JSON list in the ALBEF/Karpathy format and a folder of images.

    annotations: the JSON file. images: the folder that its `image` paths start from.
    title, split: as the tables shall name them.
    captions: pre-processing; "albef": lower case, punctuation removed; "blip": lower case, some punctuation to blanks;
        both keep 30 words.
    """
    return read_retrieval_set(annotations, images, name=title, split=split, captions=captions)


def resolve_device(name: str) -> torch.device:
    """ "auto" is a GPU when there is one. Raises UserError on a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UserError(f"device: '{name}' is no device of fastmat; write auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: '{name}' is not here; this machine has {torch.cuda.device_count()} CUDA devices")
    return device
