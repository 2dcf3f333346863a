"""`fastmat export RUN`: a trained model with its card, whole or not at all."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from cli.conftest import Fastmat
from models.test_export import CONFIGS, clip_folder
from report.samples import made_row
from safetensors.torch import load_file

from fastmat.cli import export_model
from fastmat.errors import UserError
from fastmat.evaluation.results import Results, write_results

SETTINGS = (
    "data={name: digits, split: val}",
    "limit=16",
    "defence={name: tecoa_itr, steps: 1}",
    "threat={eps: 4/255, max_words: 2}",
    "batch_size=8",
    "train={steps: 2, lr: 0.01, save_every: 1}",
    "tracker=none",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastmat.cli.main import main

    folder = tmp_path_factory.mktemp("runs")
    start = clip_folder(folder / "tiny-vit", CONFIGS["vit"])
    validation = "validation={data: {name: digits, split: test}, images: 4, attack: {name: pgd, steps: 1}}"
    words = ["train", f"model={{name: open_clip, architecture: {start}}}", *SETTINGS, validation]
    assert main([*words, "--out", str(folder / "run")]) == 0
    return folder / "run"


def write_evaluation(folder: Path, run: Path) -> Path:
    config = {"victims": {"ours": {"model": {"name": "open_clip", "weights": str(run / "model.safetensors")}}}}
    rows = [
        made_row(victim="ours", surrogate="ours", attack="none", tr=61.5),
        made_row(victim="ours", surrogate="ours", attack="sga", tr=33.5, dataset="a|b"),
        made_row(victim="other", surrogate="other", attack="none", tr=77.5),
    ]
    write_results(folder, Results(rows=rows, config=config, environment={}))
    return folder


def test_a_run_is_exported_with_its_card(fastmat: Fastmat, run: Path, tmp_path: Path) -> None:
    evaluation = write_evaluation(tmp_path / "eval", run)
    out = tmp_path / "hardened"
    code, shown, error = fastmat("export", run, "--out", out, "--results", evaluation, "--checkpoint", "last")
    assert code == 0, error
    assert "open_clip loads it" in shown
    clip = open_clip.create_model(f"local-dir:{out}")
    trained = load_file(run / "model.safetensors")
    assert torch.equal(clip.visual.proj, trained["image_projection.weight"].T)
    assert torch.equal(clip.ln_final.weight, trained["text_tower.text.ln_final.weight"])
    card = (out / "README.md").read_text()
    for said in (
        "library_name: open_clip",
        "# tiny-vit, TeCoA-ITR",
        "at most 4/255 (pixels in [0, 1], linf) and substitute at most 2 words of a caption",
        "| outer steps | 2 of 2 |",
        "| set | digits |",
        "| first images only | 16 |",
        "| Clean |  | digits test | 1,000 | 61.5 (59.0 to 64.0) |",
        "33.5 (31.0 to 36.0)",
        "a\\|b test",
        "Validation during training: ",
    ):
        assert said in card, (said, card)
    assert "77.5" not in card and str(run.parent) not in card
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_best_checkpoint_is_the_default(fastmat: Fastmat, run: Path, tmp_path: Path) -> None:
    best = run / "checkpoints" / (run / "checkpoints" / "best").read_text()
    assert fastmat("export", run, "--out", tmp_path / "a")[0] == 0
    exported = load_file(tmp_path / "a" / "open_clip_model.safetensors")
    weights = load_file(best / "weights.safetensors")
    assert torch.equal(exported["visual.proj"], weights["image_projection.weight"].T)
    assert f"| outer steps | {int(best.name[5:])} of 2 |" in (tmp_path / "a" / "README.md").read_text()


def test_adapters_are_merged(fastmat: Fastmat, run: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = f"model={{name: open_clip, architecture: {run.parent / 'tiny-vit'}}}"
    words = ("train", model, *SETTINGS, "adapters={targets: [c_fc], rank: 2}", "--out", tmp_path / "run")
    code, _, error = fastmat(*words)
    assert code == 0, error
    code, _, error = fastmat("export", tmp_path / "run", "--out", tmp_path / "out")
    assert code == 0, error
    exported = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    merged = load_file(tmp_path / "run" / "model.safetensors")
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    torch.testing.assert_close(exported[name], merged[f"text_tower.text.{name}"])
    start = load_file(run.parent / "tiny-vit" / "open_clip_model.safetensors")
    assert not torch.equal(exported[name], start[name])


def test_nothing_stays_of_an_export_that_failed(
    fastmat: Fastmat, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object, **named: object) -> str:
        raise UserError("no space left")

    monkeypatch.setattr(export_model, "model_card", fail)
    assert fastmat("export", run, "--out", tmp_path / "out")[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_sentence(fastmat: Fastmat, run: Path, tmp_path: Path) -> None:
    evaluation = write_evaluation(tmp_path / "eval", tmp_path / "elsewhere")
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    for file in damaged.glob("checkpoints/*/weights.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    (damaged / "checkpoints" / "best").unlink()
    own = tmp_path / "own"
    code, _, error = fastmat("train", "model=tiny", *SETTINGS, "--out", own)
    assert code == 0, error
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    for words, says in (
        ((run, "--checkpoint", "step-00000009"), "has step-00000001, step-00000002; name one of them, best or last"),
        ((damaged, "--checkpoint", "best"), "none is the best"),
        ((own,), "'tiny' is of no other library; its weights are plain safetensors already"),
        ((damaged,), "is damaged (weights.safetensors); export another one"),
        ((run, "--results", evaluation), "none of which has weights out of"),
        ((run, "--results", evaluation, "--victim", "theirs"), "judges ours, other"),
        ((run, "--results", tmp_path / "nowhere"), "no such file"),
        ((run, "data.split=test"), "is for an adversarial set"),
        ((empty,), "holds no checkpoint that can be read"),
        ((tmp_path / "nowhere", "--checkpoint", "best"), "--checkpoint is for a training run"),
    ):
        code, _, error = fastmat("export", *words, "--out", tmp_path / "out")
        assert code == 2 and says in error, (words, error)
        assert len(error.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
    said = json.loads((own / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert said["told"]["config"]["model"] == {"name": "tiny"}
