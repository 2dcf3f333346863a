"""What bad files and folders get: exit code 2, one sentence, and every file as it was before."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastmat.models.tiny import tiny_clip
from fastmat.models.weights import save_weights

Fastmat = Callable[..., tuple[int, str, str]]
COMMANDS = {
    "attack": ["model=tiny", "attack={name: pgd, steps: 1}"],
    "train": ["model=tiny", "defence=finetune", "train={steps: 2, save_every: 1}", "batch_size=2"],
    "eval": ["victims.plain.model=tiny", "attacks.pgd={name: pgd, steps: 1}", "resamples=10"],
}
MODEL = {"attack": "model", "train": "model", "eval": "victims.plain.model"}


def state_of(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(fastmat: Fastmat, settings: list[str], tmp_path: Path) -> Callable[..., str]:
    """Runs a command into `tmp_path/out`; its sentence, once all else was found to be right."""

    def run(command: str, *words: object) -> str:
        before = state_of(tmp_path)
        code, _, error = fastmat(command, *settings, *COMMANDS[command], "--out", tmp_path / "out", *words)
        assert code == 2, error
        assert error.startswith("fastmat: ") and error.count("\n") == 1, error
        assert state_of(tmp_path) == before
        return error

    return run


def truncated(path: Path) -> None:
    noise = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(path)
    path.write_bytes(path.read_bytes()[:1000])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, "bad.png: cannot be decoded"),
    "text": (lambda path: path.write_text("hello"), "bad.png: not a picture"),
    "hair": (lambda path: Image.new("L", (1, 20_000)).save(path), "bad.png: 1 x 20000 is longer than 100:1"),
    "missing": (lambda path: None, "bad.png is missing (1 of 3 are)"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", BROKEN)
def test_pictures(refused: Callable[..., str], tmp_path: Path, command: str, kind: str) -> None:
    make, sentence = BROKEN[kind]
    rows = [{"image": name, "caption": "a red dog"} for name in ("0.png", "1.png", "bad.png")]
    for row in rows[:2]:
        Image.new("RGB", (32, 32)).save(tmp_path / row["image"])
    make(tmp_path / "bad.png")
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(rows))
    batch = "batch_size=3"  # training draws every image in its first step
    error = refused(command, f"data.annotations={file}", f"data.images={tmp_path}", batch)
    assert f"{file}, row 3: " in error
    assert sentence in error


class Code:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def weights(name: str, folder: Path) -> Path:
    if name == "pickle":
        (folder / "w.pt").write_bytes(pickle.dumps({"weight": Code()}))
    elif name == "torch pickle":
        torch.save({"weight": Code()}, folder / "w.pt")
    elif name == "another":
        save_weights(tiny_clip(image_size=64), folder / "w.pt")
        return (folder / "w.pt").rename(folder / "w.safetensors")
    elif name == "nan":
        model = tiny_clip()
        with torch.no_grad():
            model.log_logit_scale.fill_(float("nan"))
        torch.save(model.state_dict(), folder / "w.pt")
    return folder / "w.pt"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("pickle", "w.pt cannot be read as plain tensors; it is damaged or carries code, which is never run"),
        ("torch pickle", "w.pt cannot be read as plain tensors"),
        ("another", "w.safetensors does not fit this model"),
        ("nan", "its weights are NaN or infinite in 'log_logit_scale'"),
        ("missing", "w.pt does not exist"),
    ],
)
def test_weights(
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    kind: str,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(command, f"{MODEL[command]}={{name: tiny, weights: {weights(kind, tmp_path)}}}")


def test_the_weights_of_every_victim_are_looked_for_first(refused: Callable[..., str]) -> None:
    error = refused("eval", "victims.late.model={name: tiny, weights: none.safetensors}")
    assert "victims.late.model: weights file none.safetensors does not exist" in error


@pytest.mark.parametrize("command", COMMANDS)
def test_out_below_a_file(refused: Callable[..., str], tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot be made" in refused(command, "--out", tmp_path / "file" / "out")
    assert "is a file" in refused(command, "--out", tmp_path / "file")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_another_command_is_not_gone_on_with(
    refused: Callable[..., str], tmp_path: Path, command: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "to go on with" in refused(command, "--resume")
    assert "exists and is not empty; name a new folder, remove it\n" in refused(command)


def test_nan_loss(fastmat: Fastmat, settings: list[str], tmp_path: Path) -> None:
    words = [*settings, *COMMANDS["train"], "train={steps: 9, lr: 1e30, clip_norm: null}", "--out", tmp_path / "run"]
    code, _, error = fastmat("train", *words)
    assert (code, error.count("\n")) == (2, 1)
    assert "not finite 3 steps in a row" in error
    assert "lower lr" in error
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_masked_language_model_that_is_none(refused: Callable[..., str], mlm_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mlm"
    shutil.copytree(mlm_folder, folder)
    (folder / "model.safetensors").unlink()
    for words in (f"mlm={folder}", f"mlm={tmp_path / 'nowhere'}"):
        assert "no masked language model could be loaded from" in refused("attack", "attack=bert_attack", words)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Code()}))
    assert "no masked language model" in refused("attack", "attack=bert_attack", f"mlm={folder}")


NEW_KEYS: dict[str, list[tuple[str, str]]] = {
    "attack": [
        ("engine.precision=fp8", "engine: precision: input should be 'fp32' or 'bf16', got 'fp8'"),
        ("engine.micro_batch=0", "engine: micro_batch must be at least 1, got 0"),
        ("engine={precison: bf16}", "engine: unknown key 'precison'; did you mean 'precision'?"),
        ("engine=bf16", "engine: expected {key: value}, got 'bf16'"),
        ("image_cache=FILE", "image_cache FILE cannot be used"),
        ("image_cache=3", "image_cache: input should be a path, got 3"),
        ("candidate_cache=FILE", "folder of candidates FILE is a file: give a directory"),
        ("candidate_cache=[a]", "candidate_cache: input should be a path, got ['a']"),
        ("candidate_cach=a", "unknown key 'candidate_cach'; did you mean 'candidate_cache'?"),
        (
            "attack={name: sga, candidates: {name: maskd}}",
            "candidates: unknown name 'maskd'; did you mean",
        ),
        ("attack={name: sga, candidates: {name: masked, candidate_cache: a}}", "'candidate_cache' is not set here"),
        ("attack=universal", "attack: this attack is fitted before it attacks: set fit_data to data"),
        ("attack={name: universal, perturbation: FILE}", "FILE holds no universal perturbation"),
        ("fit_data=digit", "fit_data: unknown name 'digit'; did you mean 'digits'?"),
        ("fit_data={name: digits, split: training}", "fit_data: split: input should be 'train', 'val' or 'test'"),
        ("fit_limit=0", "fit_limit: input should be greater than 0, got 0"),
    ],
    "train": [
        ("candidate_cache=FILE", "folder of candidates FILE is a file: give a directory"),
        ("fit_data=digits", "unknown key 'fit_data'"),
    ],
    "eval": [
        ("subset.pgd=0", "subset.pgd: input should be greater than 0, got 0"),
        ("subset=5", "subset: input should be a valid dictionary, got 5"),
        ("subset.pdg=2", "subset: 'pdg' is no label of attacks; did you mean 'pgd'?"),
        ("subset.pgd=7", "subset.pgd: six/test has 6 images, cannot take 7"),
        ("surrogates=tiny", "surrogates: input should be a valid dictionary, got 'tiny'"),
        ("surrogates.a=tinny", "surrogates.a: unknown name 'tinny'; did you mean 'tiny'?"),
        ("surrogates.a={name: tiny, weights: none.pt}", "surrogates.a: weights file none.pt does not exist"),
        ("surrogates={a b: tiny}", "surrogates.a b: a label may hold letters, digits and . + - _ only, got 'a b'"),
        ("engine.cuda_graph=true", "engine: cuda_graph needs a CUDA device, this run is on cpu"),
        ("image_cache=FILE", "image_cache FILE cannot be used"),
        ("candidate_cache=FILE", "folder of candidates FILE is a file: give a directory"),
        ("attacks.pgd={name: universal}", "attacks.pgd: this attack is fitted before it attacks: set fit_data"),
        ("fit_data.split=val", "fit_data: expected a name or {name: ..., argument: ...}, got {'split': 'val'}"),
    ],
}


@pytest.mark.parametrize(
    ("command", "word", "sentence"), [(c, *pair) for c, pairs in NEW_KEYS.items() for pair in pairs]
)
def test_keys(refused: Callable[..., str], tmp_path: Path, command: str, word: str, sentence: str) -> None:
    """FILE stands for a file where a folder should be."""
    (tmp_path / "file").write_text("mine")
    assert sentence.replace("FILE", str(tmp_path / "file")) in refused(
        command, word.replace("FILE", str(tmp_path / "file"))
    )
