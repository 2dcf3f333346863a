"""Configs: files, overrides, fractions, and what a mistake is answered with."""

from importlib import import_module
from pathlib import Path

import pytest

from fastmat.build import Component
from fastmat.cli.config import AttackConfig, EvalConfig, QuickstartConfig, Section, TaskConfig, TrainConfig
from fastmat.cli.load import load_config, plain, shipped
from fastmat.cli.pipeline_config import PipelineConfig
from fastmat.cli.study import STUDIES
from fastmat.errors import UserError

BASE = "model: tiny\ndata: {name: digits, split: test}\nattack: {name: pgd, steps: 3}\n"


@pytest.fixture
def base(tmp_path: Path) -> str:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return str(path)


def test_file_and_overrides(base: str) -> None:
    config = load_config(AttackConfig, base, ["attack.steps=20", "threat.eps=4/255", "limit=5", "model.seed=3"])
    assert config.attack == Component(name="pgd", arguments={"steps": 20})
    assert config.model == Component(name="tiny", arguments={"seed": 3})
    assert config.threat == {"eps": "4/255"}
    assert (config.limit, config.batch_size, config.seed) == (5, 32, 0)


def test_everything_may_come_from_overrides() -> None:
    config = load_config(AttackConfig, None, ["model=tiny", "data={name: digits, split: val}", "attack=sga"])
    assert config.attack == Component(name="sga")


@pytest.mark.parametrize("written", ["[1/255, 2/255]", "[0.00392156862745098, 2/255]", "['1/255', 2 / 255]"])
def test_fractions_in_lists(written: str) -> None:
    overrides = ["victims.a.model=tiny", "data={name: digits, split: test}", f"eps={written}"]
    assert load_config(EvalConfig, None, overrides).eps == pytest.approx((1 / 255, 2 / 255), abs=1e-12)


def test_resolved_config_is_plain_and_can_be_read_back(base: str) -> None:
    config = load_config(AttackConfig, base, ["threat.eps=4/255"])
    resolved = plain(config)
    assert resolved["attack"] == {"name": "pgd", "steps": 3}
    assert AttackConfig.model_validate(resolved) == config


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["atack.steps=3"], "{file}: unknown key 'atack'; did you mean 'attack'?"),
        (["attack.stepz=3"], "{file}: attack: unknown key 'stepz'; did you mean 'steps'?"),
        (["attack.name=sgaa"], "{file}: attack: unknown name 'sgaa'; did you mean 'sga'?"),
        (["attack.steps=ten"], "{file}: attack: steps: input should be a valid integer"),
        (["attack.objective=cosin"], "{file}: attack: objective: unknown name 'cosin'; did you mean 'cosine'?"),
        (
            ["attack.quirks={antialiaz: false}"],
            "{file}: attack: quirks: unknown key 'antialiaz'; did you mean 'antialias'?",
        ),
        (["attack.parity=oficial"], "{file}: attack: parity must be 'correct' or 'official', got 'oficial'"),
        (["attack.max_words=2"], "{file}: attack: 'max_words' is not set here but in 'threat'"),
        (["threat.epsilon=0.1"], "{file}: threat: unknown key 'epsilon'; did you mean 'eps'?"),
        (
            ["threat.eps=2"],
            "{file}: threat: eps=2 looks like 8-bit pixel units, but eps is in [0, 1] units: write 2/255",
        ),
        (["threat.eps=2/0"], "{file}: threat: eps: '2/0' is not a fraction"),
        (["threat.eps=-1/255"], "{file}: threat: eps must not be negative"),
        (["threat.norm=l1"], "{file}: threat: norm: input should be 'linf' or 'l2', got 'l1'"),
        (
            ["model=ViT-B-16"],
            "{file}: model: unknown name 'ViT-B-16'; known: albef, albef_ve, blip, blip_captioner, ",
        ),
        (["data=[1]"], "{file}: data: expected a name or {{name: ..., argument: ...}}, got [1]"),
        (["limit=0"], "{file}: limit: input should be greater than 0, got 0"),
        (["steps"], "'steps' must read key=value, such as attack.steps=20; a config is named by --config"),
        (["batch_size.x=1", "batch_size.x.y=1"], "override 'batch_size.x.y': 'x' is a value, not a section"),
        (["limit=[1"], "override 'limit=[1': the value is not YAML at line 1, column 3: expected ',' or ']'"),
        (
            ["model={seed: 1, seed: 2}"],
            "override 'model={{seed: 1, seed: 2}}': the value is not YAML at line 1, column 1: key",
        ),
        (["data={name: json, annotations: null}"], "{file}: data: annotations: input should be a path, got None"),
    ],
)
def test_mistakes(base: str, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(AttackConfig, base, overrides)
    assert str(raised.value).startswith(sentence.format(file=base))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty; expected keys and values"),
        (b"a: [", "is not YAML at line 1, column 5"),
        (b"a: \x07", "is not YAML: unacceptable character"),
        (b"a: 2001-99-99", "is not YAML: month must be in"),
        (b"a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        (b"[" * 3000, "is nested too deeply"),
        (b"model: tiny\nseed: 1\nseed: 2\n", "key 'seed' stands twice"),
        (b"- 1\n- 2\n", "holds a list; expected keys and values"),
        (b"model: \xff\xfe", "is not UTF-8 text"),
        (b"attack: pgd\ndata: {name: digits, split: test}\n", "model: this key is required; set it"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as raised:
        load_config(AttackConfig, str(path))
    assert str(path) in str(raised.value)


def test_unknown_config_names_the_nearest() -> None:
    with pytest.raises(UserError, match="neither a file nor a shipped config; did you mean 'quickstart'"):
        load_config(QuickstartConfig, "quikstart")


def test_labels_are_words() -> None:
    overrides = ["victims.a.model=tiny", "data={name: digits, split: test}", "attacks={a b: pgd}"]
    with pytest.raises(
        UserError, match=r"attacks\.a b: a label may hold letters, digits and \. \+ - _ only, got 'a b'"
    ):
        load_config(EvalConfig, None, overrides)


def study_of(name: str) -> str:
    return next(study for study in STUDIES if name.startswith(study))


def schema_of(name: str) -> type[Section]:
    if name.endswith("-study"):
        schema: type[Section] = import_module(STUDIES[study_of(name)]).Config
        return schema
    kinds = {
        "attack": AttackConfig,
        "train": TrainConfig,
        "eval": EvalConfig,
        "task": TaskConfig,
        "quickstart": QuickstartConfig,
        "pipeline": PipelineConfig,
    }
    return kinds[name.rsplit("-", 1)[-1]]


@pytest.mark.parametrize("name", shipped())
def test_shipped_configs_are_valid_and_open_with_their_command(name: str) -> None:
    load_config(schema_of(name), name)
    first = (Path(__file__).parents[2] / "configs" / f"{name}.yaml").read_text().splitlines()[0]
    command = name.rsplit("-", 1)[-1]
    command += f" {study_of(name)}" if command == "study" else ""
    command = "eval --pipeline" if command == "pipeline" else command
    assert first.startswith(f"# fastmat {command} " + ("" if name == "quickstart" else f"--config {name} "))


def test_shipped_configs_cover_what_the_readme_promises() -> None:
    sets = [
        f"clip-vit-b16-{data}-{task}"
        for data in ("flickr30k", "coco", "flickr8k")
        for task in ("attack", "train", "eval")
    ]
    fused = [
        f"{model}-{data}-{task}"
        for model in ("albef", "blip")
        for data in ("flickr30k", "coco")
        for task in ("train", "eval")
    ]
    tasks = ["albef-refcoco-task", "albef-snli-ve-task", "blip-coco-captions-task", "clip-zero-shot-task"]
    truths = ["clip-vit-b16-coco-eccv-eval"]
    studies = [f"{name}-study" for name in (*STUDIES, "itc-weight-coco")]
    assert shipped() == sorted([*sets, *fused, *tasks, *truths, *studies, "quickstart", "pipeline"])
