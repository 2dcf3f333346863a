"""`fastmat augment`: from a set to an augmented set, its report, and a training run that reads it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Fastmat = Callable[..., tuple[int, str, str]]
ENTRIES = {
    "dog": {"n": ["hound", "pooch"]},
    "cat": {"n": ["feline"]},
    "ball": {"n": ["sphere"]},
    "man": {"n": ["bloke"]},
    "red": {"a": ["crimson"]},
    "water": {"n": ["pool"]},
}


@pytest.fixture
def lexicon(tmp_path: Path) -> Path:
    path = tmp_path / "lexicon.json"
    path.write_text(json.dumps(ENTRIES))
    return path


@pytest.fixture
def augmented(fastmat: Fastmat, pictures: Path, lexicon: Path, tmp_path: Path) -> Path:
    """The six pictures with their captions, and two by EDA for each."""
    out = tmp_path / "sets" / "eda"
    words = (
        "--with",
        "eda",
        f"generator.lexicon={lexicon}",
        "--data",
        pictures / "test.json",
        "--out",
        out,
        "copies=2",
    )
    code, shown, error = fastmat("augment", *words)
    assert code == 0, error
    rows = json.loads((out / "augmented.json").read_text())
    made = sum(row["generator"] == "eda" for row in rows)
    assert len(rows) == 12 + made and made > 15
    assert shown == f"{made} captions made, {24 - made} results dropped: {out}/augmented.json\n"
    return out


def as_data(folder: Path) -> str:
    data = {"name": "json", "title": "six", "split": "train"}
    return f"data={json.dumps({**data, 'annotations': str(folder / 'augmented.json'), 'images': str(folder)})}"


def test_equal_commands_give_equal_sets(fastmat: Fastmat, augmented: Path, pictures: Path, lexicon: Path) -> None:
    again, other = augmented.with_name("again"), augmented.with_name("other")
    for out, seed in ((again, 0), (other, 1)):
        words = (f"generator={{name: eda, lexicon: {lexicon}}}", "copies=2", f"seed={seed}", "batch_size=5")
        assert fastmat("augment", *words, "--data", pictures / "test.json", "--out", out)[0] == 0
    contents = [(folder / "augmented.json").read_text() for folder in (augmented, again, other)]
    assert contents[0] == contents[1] != contents[2]


def test_captions_of_a_file_and_of_a_function(
    fastmat: Fastmat, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made.jsonl").write_text(json.dumps({"image_id": "images/1.png", "caption": "a sleepy cat"}))
    (tmp_path / "my_cli_paraphrases.py").write_text(
        "def louder(requests):\n    return [r.caption.upper() for r in requests]\n"
    )
    monkeypatch.chdir(tmp_path)
    common = ("--data", pictures / "test.json", "limit=3")
    code, shown, error = fastmat("augment", "--with", "jsonl:made.jsonl", *common, "--out", "one")
    assert code == 0 and shown == "1 captions made, 2 results dropped: one/augmented.json\n", error
    code, shown, error = fastmat("augment", "--with", "my_cli_paraphrases:louder", *common, "--out", "two")
    assert code == 0 and shown == "6 captions made, 0 results dropped: two/augmented.json\n", error
    rows = json.loads((tmp_path / "two/augmented.json").read_text())
    assert {row["generator"] for row in rows} == {"human", "my_cli_paraphrases:louder"}


def test_the_report_measures_an_augmented_set(fastmat: Fastmat, augmented: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    words = ("--report", "--data", augmented / "augmented.json", "--out", out, "model=tiny", "resamples=50")
    code, shown, error = fastmat("augment", *words)
    assert code == 0, error
    header, human, eda, page = shown.splitlines()
    assert header.split()[:2] == ["source", "made"] and page == f"{out}/augment.html"
    assert human.startswith("Human") and "12 captions" in human and eda.startswith("EDA")
    content = json.loads((out / "augment.json").read_text())
    assert [source["source"] for source in content["sources"]] == ["human", "eda"]
    assert content["models"]["eda"].startswith("lexicon.json sha256:") and len(content["weights_sha256"]) == 64
    gap = content["sources"][1]["gap"]
    assert f"{gap['value']:.2f} [{gap['low']:.2f} to {gap['high']:.2f}]" in eda
    assert "<svg" in (out / "augment.html").read_text()


def test_training_draws_from_an_augmented_set(fastmat: Fastmat, augmented: Path, tmp_path: Path) -> None:
    settings = ["model=tiny", "defence=finetune", "train={steps: 3, log_every: 1}", "batch_size=4"]
    plain = [as_data(augmented), *settings]
    losses = {}
    for name, more in {
        "plain": [],
        "human": ["augment={captions: 2}"],
        "both": ["augment={captions: 2, generated: 0.5, views: 1}"],
        "again": ["augment={captions: 2, generated: 0.5, views: 1}"],
    }.items():
        code, _, error = fastmat("train", *plain, *more, "--out", tmp_path / name)
        assert code == 0, error
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert losses["both"] == losses["again"]
    assert len({tuple(values) for values in losses.values()}) == 3


def test_an_augmented_set_whose_image_is_missing(fastmat: Fastmat, augmented: Path, tmp_path: Path) -> None:
    rows = json.loads((augmented / "augmented.json").read_text())
    rows[5]["image"] = "../../nowhere/3.png"
    rows[5]["image_id"] = "3"
    (augmented / "augmented.json").write_text(json.dumps(rows))
    settings = ["model=tiny", "defence=finetune", "train.steps=1", "batch_size=4"]
    for command in (
        ("train", as_data(augmented), *settings),
        ("augment", "--report", as_data(augmented), "model=tiny"),
    ):
        code, shown, error = fastmat(*command, "--out", tmp_path / "out")
        assert (code, shown) == (2, "")
        assert error.count("\n") == 1 and "augmented.json, row 6: image file" in error and "3.png is missing" in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "SET"], "nothing is named to augment with: add --with"),
        (["--with", "edda", "--data", "SET"], "--with: unknown generator 'edda'; did you mean 'eda'"),
        (["--with", "eda", "--data", "SET"], "generator: 'lexicon' is missing"),
        (["--with", "eda", "--data", "nowhere.json"], "--data: nowhere.json is no file"),
        (["--with", "eda", "generator.lexicon=nowhere.json", "--data", "SET"], "lexicon nowhere.json cannot be read"),
        (["--with", "eda", "generator.alfa=1", "--data", "SET"], "unknown key 'alfa'; did you mean 'alpha'"),
        (["--with", "jsonl:nowhere.jsonl", "--data", "SET"], "generator: nowhere.jsonl cannot be read"),
        (["--with", "no_module_here:f", "--data", "SET"], "generator: 'no_module_here:f' is not here"),
        (["--with", "eda", "--report", "--data", "SET"], "leave --with out"),
        (["--report", "--data", "SET"], "--report needs a model"),
        (["--report", "--data", "SET", "model=tiny"], "says of no caption that it was generated"),
        (["--with", "eda"], "data: this key is required"),
    ],
)
def test_mistakes_are_one_sentence(
    fastmat: Fastmat, pictures: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    given = [str(pictures / "test.json") if word == "SET" else word for word in words]
    code, shown, error = fastmat("augment", *given, "--out", tmp_path / "out")
    assert (code, shown) == (2, "") and error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("augment", "said"),
    [
        ("{captions: 2, generated: 0.5}", "augment: generated is 0.5, but the data has human captions only"),
        ("{generated: 0.5}", "set captions to a number, too"),
        ("{captoins: 2}", "did you mean 'captions'"),
    ],
)
def test_training_refuses_what_the_set_cannot_give(
    fastmat: Fastmat, pictures: Path, tmp_path: Path, augment: str, said: str
) -> None:
    data = {"name": "json", "title": "six", "split": "train", "images": str(pictures)}
    data["annotations"] = str(pictures / "test.json")
    settings = ["model=tiny", "defence=finetune", "train.steps=1", "batch_size=4", f"augment={augment}"]
    code, _, error = fastmat("train", f"data={json.dumps(data)}", *settings, "--out", tmp_path / "out")
    assert code == 2 and said in error and error.count("\n") == 1


def test_folders_in_use_stay(fastmat: Fastmat, augmented: Path, pictures: Path, lexicon: Path) -> None:
    before = (augmented / "augmented.json").read_bytes()
    words = ("--with", "eda", f"generator.lexicon={lexicon}", "--data", pictures / "test.json")
    code, _, error = fastmat("augment", *words, "--out", augmented)
    assert code == 2 and "exists and is not empty" in error
    assert (augmented / "augmented.json").read_bytes() == before
