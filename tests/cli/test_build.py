"""Names and arguments to objects: signatures decide, quirks and budgets come from their own sections."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_mlm import tiny_mlm

from fastmat import build
from fastmat.attacks.bert_attack import BertAttack
from fastmat.attacks.objectives import CosineToOwn, Objective
from fastmat.attacks.pgd import PGD
from fastmat.attacks.word_substitution import WordSubstitution
from fastmat.build import (
    Component,
    build_attack,
    build_defence,
    build_mlm,
    build_model,
    construct,
    locate,
    parameters_of,
)
from fastmat.defences.fare import FARE
from fastmat.defences.mat import MAT
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.models.weights import save_weights, weights_hash
from fastmat.quirks import Quirks
from fastmat.text.masked import MaskedCandidates
from fastmat.types import ThreatModel

REGISTRIES = (
    build.MODELS,
    build.ATTACKS,
    build.OBJECTIVES,
    build.DEFENCES,
    build.CANDIDATES,
    build.TEXT_SEARCHES,
    build.DATASETS,
)
THREAT = ThreatModel(eps=4 / 255, max_words=2)


def no_mlm() -> object:
    return build_mlm(None)


def attack_of(value: object) -> object:
    component = build.parse(value, build.ATTACKS, where="attack")
    return build_attack(component, threat=THREAT, mlm=tiny_mlm, seed=7)


def defence_of(value: object) -> object:
    component = build.parse(value, build.DEFENCES, where="defence")
    return build_defence(
        component, teacher=tiny_clip(), threat=THREAT, mlm=tiny_mlm, seed=7, prompts=lambda: (("a dog",), ("a cat",))
    )


@pytest.mark.parametrize("path", [path for registry in REGISTRIES for path in registry.values()])
def test_every_registered_name_leads_to_a_typed_signature(path: str) -> None:
    known = parameters_of(locate(path))
    assert not known.keys() & build.RESERVED
    assert all(annotation is not None for annotation, _ in known.values())


BUDGETED = [name for name, path in build.ATTACKS.items() if build.locate(path).budgeted]


@pytest.mark.parametrize("name", BUDGETED)
def test_every_attack_takes_budgets_and_seed_from_outside(name: str) -> None:
    attack = build_attack(Component(name=name), threat=THREAT, mlm=tiny_mlm, seed=7)
    assert attack.threat == THREAT
    assert attack.seed == 7


def test_perturbations_keep_no_budget_and_take_the_seed() -> None:
    component = Component(name="corruption", arguments={"kind": "fog"})
    attack = build_attack(component, threat=THREAT, mlm=no_mlm, seed=7)
    assert (attack.threat.eps, attack.threat.max_words, attack.seed) == (0.0, 0, 7)
    assert set(build.ATTACKS) - set(BUDGETED) == {"corruption", "stylize", "text_perturbation"}


@pytest.mark.parametrize("name", build.DEFENCES)
def test_every_defence_can_be_built_by_name(name: str) -> None:
    assert defence_of(name).trains  # type: ignore[attr-defined]


def test_embedding_space_needs_no_language_model() -> None:
    component = build.parse({"name": "mat", "text_search": "embedding_space"}, build.DEFENCES, where="defence")
    defence = build_defence(component, teacher=tiny_clip(), threat=THREAT, mlm=no_mlm, seed=7)
    assert type(defence.text_search).__name__ == "EmbeddingSpace"  # type: ignore[attr-defined]
    assert defence.text_search.seed == 7  # type: ignore[attr-defined]


def test_a_defence_on_classes_says_that_the_set_has_no_labels() -> None:
    component = build.parse("tecoa", build.DEFENCES, where="defence")
    with pytest.raises(UserError, match="defence: the captions of this set are no class labels"):
        build_defence(component, teacher=tiny_clip(), threat=THREAT, mlm=no_mlm, seed=7)


def test_arguments_are_converted() -> None:
    attack = attack_of({"name": "pgd", "steps": "3", "step_size": "1/255", "objective": "cosine"})
    assert isinstance(attack, PGD)
    assert (attack.steps, attack.step_size) == (3, 1 / 255)
    assert isinstance(attack.objective, CosineToOwn)


def test_an_image_attack_needs_no_language_model_and_a_text_attack_says_so() -> None:
    build_attack(Component(name="pgd"), threat=THREAT, mlm=no_mlm, seed=0)
    with pytest.raises(UserError, match="set mlm to a transformers BertForMaskedLM"):
        build_attack(Component(name="sga"), threat=THREAT, mlm=no_mlm, seed=0)


def test_parity_is_the_preset_and_single_quirks_stand_on_top() -> None:
    assert attack_of("pgd").quirks == Quirks()  # type: ignore[attr-defined]
    assert attack_of({"name": "pgd", "parity": "official"}).quirks == Quirks.official()  # type: ignore[attr-defined]
    mixed = attack_of({"name": "pgd", "parity": "official", "quirks": {"antialias": True, "text_max_length": 30}})
    assert mixed.quirks == Quirks.official().but(antialias=True, text_max_length=30)  # type: ignore[attr-defined]
    sep = attack_of({"name": "sep", "parity": "official"})
    assert sep.words.quirks == Quirks.official(text_max_length=30)  # type: ignore[attr-defined]
    assert attack_of({"name": "sga", "quirks": {"append_sep": False}}).quirks.append_sep is False  # type: ignore[attr-defined]


def test_text_attacks_get_the_word_budget_and_the_quirks() -> None:
    attack = attack_of({"name": "bert_attack", "parity": "official", "candidates": {"name": "masked", "top_k": 4}})
    assert isinstance(attack, BertAttack)
    assert isinstance(attack.words.candidates, MaskedCandidates)
    assert (attack.words.max_words, attack.words.candidates.top_k) == (2, 4)
    assert attack.words.quirks == Quirks.official()


def test_mat_searches_words_with_the_settings_of_its_section() -> None:
    plain, set_up = (
        defence_of("mat"),
        defence_of({"name": "mat", "text_search": {"name": "word_substitution", "beam": 3}}),
    )
    assert isinstance(plain, MAT)
    assert isinstance(set_up, MAT)
    assert isinstance(plain.text_search, WordSubstitution)
    assert isinstance(set_up.text_search, WordSubstitution)
    assert (plain.text_search.beam, plain.text_search.max_words) == (1, 2)
    assert (set_up.text_search.beam, set_up.text_search.max_words) == (3, 2)


def test_fare_keeps_a_teacher_of_its_own() -> None:
    teacher = tiny_clip()
    defence = build_defence(Component(name="fare"), teacher=teacher, threat=THREAT, mlm=no_mlm, seed=0)
    assert isinstance(defence, FARE)
    assert defence.teacher is not teacher


def test_weights_go_on_top_of_any_model(tmp_path: Path) -> None:
    trained = tiny_clip(seed=5)
    save_weights(trained, tmp_path / "model.safetensors")
    arguments = {"weights": str(tmp_path / "model.safetensors")}
    model = build_model(build.parse({"name": "tiny", **arguments}, build.MODELS, where="model"))
    assert weights_hash(model) == weights_hash(trained)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="does not fit this model"):
        build_model(Component(name="tiny", arguments={"image_size": 64, **arguments}))
    with pytest.raises(UserError, match=r"nowhere\.safetensors does not exist"):
        build_model(Component(name="tiny", arguments={"weights": "nowhere.safetensors"}))


@dataclass(frozen=True, kw_only=True)
class Sample:
    name: str
    rate: float | None = None
    sizes: tuple[int, ...] = ()
    shares: dict[str, float] | None = None
    objective: Objective | None = None

    def __post_init__(self) -> None:
        if self.rate is not None and self.rate < 0:
            raise UserError(f"rate must not be negative, got {self.rate}")


def test_a_fraction_is_a_number_only_where_a_number_is_wanted() -> None:
    made = construct(Sample, {"name": "1/2", "rate": "1/2", "sizes": [1, "2"], "shares": {"1/2": "1/4"}}, where="s")
    assert made == Sample(name="1/2", rate=0.5, sizes=(1, 2), shares={"1/2": 0.25})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "s: 'name' is missing"),
        ({"nane": "x"}, "s: unknown key 'nane'; did you mean 'name'?"),
        ({"name": 3}, "s.name: input should be a valid string, got 3"),
        (
            {"name": "x", "sizes": [1.5]},
            "s.sizes: input should be a valid integer, got a number with a fractional part",
        ),
        ({"name": "x", "rate": "fast"}, "s.rate: input should be a valid number"),
        ({"name": "x", "rate": -1}, "s: rate must not be negative, got -1.0"),
        ({"name": "x", "objective": {"steps": 3}}, "s.objective: expected a name or {name: ..., argument: ...}"),
        ({"name": "x", "objective": {"name": "kl", "k": 1}}, "s.objective: unknown key 'k'"),
    ],
)
def test_construct_says_what_is_wrong(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        construct(Sample, arguments, where="s")
    assert str(raised.value).startswith(sentence)


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cpu:x", "meta", "mps"])
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(UserError, match=f"device: '{name}'"):
        build.resolve_device(name)
