"""Every perturbation of captions: how much it changes, drawn anew from the same seed, others' streams untouched."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_generators import save_language_model, save_translator

from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.perturbations.text import KINDS, PUNCTUATION, STYLES, WORDS, TextPerturbation, punctuated
from fastmat.types import Batch, ThreatModel

THREAT = ThreatModel(eps=2 / 255, max_words=1)
CAPTIONS = (
    "a black dog runs in the snow with a large yellow football under some trees",
    "the man sits in the park with another person beside several wooden benches",
    "people running along crowded streets while somebody photographs everything",
)
OF_CHARACTERS = ("keyboard", "ocr", "char_insert", "char_replace", "char_swap", "char_delete")


def batch_of(captions: tuple[str, ...], *, first: int = 0) -> Batch:
    count = len(captions)
    return Batch(
        images=torch.full((count, 3, 32, 32), 0.5),
        texts=captions,
        txt2img=torch.arange(count),
        index=torch.arange(first, first + count),
        group=torch.arange(count),
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("text")
    entries = {"dog": {"n": ["hound"]}, "man": {"n": ["fellow"]}, "street": {"n": ["road"]}, "snow": {"n": ["sleet"]}}
    (folder / "lexicon.json").write_text(json.dumps(entries))
    return {
        "lexicon": folder / "lexicon.json",
        "model": save_language_model(folder / "lm", chat=False),
        "there": save_translator(folder / "there", seed=0),
        "back": save_translator(folder / "back", seed=1),
    }


def perturbation(kind: str, files: dict[str, Path], *, severity: int = 1, seed: int = 0) -> TextPerturbation:
    needs = {"lexicon": files["lexicon"]} if kind in ("synonym", "word_insert") else {}
    needs |= {"model": str(files["model"])} if kind in STYLES else {}
    needs |= {name: str(files[name]) for name in ("there", "back")} if kind == "back_translation" else {}
    return TextPerturbation(threat=THREAT, kind=kind, severity=severity, seed=seed, **needs)


def needs_nlpaug(kind: str) -> None:
    if kind in OF_CHARACTERS:
        pytest.importorskip("nlpaug")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, files: dict[str, Path]) -> None:
    needs_nlpaug(kind)
    model, batch = tiny_clip(), batch_of(CAPTIONS)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    result = perturbation(kind, files)(model, batch)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    assert before == after, "the streams of others"
    assert torch.equal(result.images, batch.images) and float(result.distance.max()) == 0
    assert len(result.texts) == len(CAPTIONS) and all(result.texts)
    assert result.texts != CAPTIONS or kind in (*STYLES, "back_translation", "word_delete")
    alone = perturbation(kind, files)(model, batch_of(CAPTIONS[1:], first=1))
    assert alone.texts == result.texts[1:]
    if kind not in (*STYLES, "back_translation"):
        most = perturbation(kind, files, severity=7)
        other = perturbation(kind, files, severity=7, seed=1)
        assert most(model, batch).texts != other(model, batch).texts or kind == "synonym"


@pytest.mark.parametrize("kind", [*OF_CHARACTERS, "word_delete"])
def test_more_severity_changes_more_words(kind: str, files: dict[str, Path]) -> None:
    needs_nlpaug(kind)
    model, batch = tiny_clip(), batch_of(CAPTIONS * 4)
    counts = [int(perturbation(kind, files, severity=s)(model, batch).words_changed.sum()) for s in (1, 4, 7)]
    assert counts[0] < counts[1] < counts[2]


def test_what_words_become(files: dict[str, Path]) -> None:
    model, batch = tiny_clip(), batch_of(CAPTIONS)
    swapped = perturbation("word_swap", files, severity=7)(model, batch).texts
    assert [sorted(text.split()) for text in swapped] == [sorted(text.split()) for text in CAPTIONS]
    (dog, _, streets) = perturbation("synonym", files)(model, batch).texts
    assert dog in (CAPTIONS[0].replace("dog", "hound"), CAPTIONS[0].replace("snow", "sleet"))
    assert streets == CAPTIONS[2].replace("streets", "roads")
    for text, source in zip(perturbation("punctuation", files, severity=7)(model, batch).texts, CAPTIONS, strict=True):
        assert [word for word in text.split() if word not in PUNCTUATION] == source.split()


def test_marks_are_as_many_as_published() -> None:
    words = CAPTIONS[0].split()
    rng = np.random.default_rng(0)
    counts = {len(punctuated(words, 0.35, rng)) - len(words) for _ in range(300)}
    assert counts == set(range(1, int(0.35 * len(words) + 1) + 1))
    assert punctuated(["dog"], 0.35, rng)[1] == "dog"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "keybord"}, "there is no kind 'keybord'; did you mean 'keyboard'"),
        ({"kind": "word_swap", "severity": 8}, "severity must be a whole number from 1 to 7, got 8"),
        ({"kind": "formal", "severity": 2, "model": "m"}, "from 1 to 1, got 2"),
        ({"kind": "synonym"}, "kind 'synonym' needs lexicon"),
        ({"kind": "back_translation", "there": "x"}, "kind 'back_translation' needs back"),
        ({"kind": "passive"}, "kind 'passive' needs model"),
    ],
)
def test_refusals(arguments: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TextPerturbation(threat=THREAT, **arguments)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nlpaug.augmenter.char", None)
    with pytest.raises(UserError, match=r"kind 'ocr' needs nlpaug.*perturbations"):
        TextPerturbation(threat=THREAT, kind="ocr")


def test_there_are_sixteen() -> None:
    assert len(KINDS) == len(set(KINDS)) == 16 and set(WORDS) < set(KINDS)
