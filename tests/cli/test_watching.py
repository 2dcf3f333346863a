"""Robust validation while a model trains: what it says, that training does not notice it, what it keeps."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli.conftest import Fastmat
from safetensors.torch import load_file

from fastmat.attacks.pgd import PGD
from fastmat.cli import validating
from fastmat.data.digits import digits_set
from fastmat.data.loader import evaluation_batches
from fastmat.errors import UserError
from fastmat.evaluation.subset import draw_rows, picked
from fastmat.models.tiny import tiny_clip
from fastmat.types import ThreatModel

RUN = (
    "model=tiny",
    "data={name: digits, split: train}",
    "limit=64",
    "defence={name: tecoa_itr, steps: 1}",
    "threat.eps=8/255",
    "batch_size=8",
    "seed=3",
    "train={steps: 6, lr: 0.01, log_every: 1, save_every: 2, keep_last: 2}",
)
WATCHED = ("validation={data: {name: digits, split: val}, images: 9, batch_size: 4, attack: {name: pgd, steps: 2}}",)


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def judged(out: Path) -> list[dict]:
    """The validations without the clock."""
    found = [line for line in lines_of(out) if "validation" in line]
    for line in found:
        del line["validation"]["seconds"]
    return found


def same_weights(a: Path, b: Path) -> bool:
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastmat.cli.main import main

    out = tmp_path_factory.mktemp("watched") / "run"
    assert main(["train", *RUN, *WATCHED, "--out", str(out)]) == 0
    return out


def test_training_does_not_notice_validation(fastmat: Fastmat, watched: Path, tmp_path: Path) -> None:
    code, _, error = fastmat("train", *RUN, "tracker=none", "--out", tmp_path / "run")
    assert code == 0, error
    assert same_weights(watched, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()
    alone = [line["loss"] for line in lines_of(tmp_path / "run")]
    assert alone == [line["loss"] for line in lines_of(watched) if "loss" in line]


def test_what_it_says_is_what_the_attack_leaves(watched: Path) -> None:
    """Ranks by sorting, the attack on all images at once, the model from the checkpoint's file."""
    lines = judged(watched)
    assert [line["step"] for line in lines] == [2, 4, 6]
    model = tiny_clip().eval()
    model.load_state_dict(load_file(watched / "checkpoints" / "step-00000006" / "weights.safetensors"))
    dataset = digits_set(split="val")
    batches = evaluation_batches(dataset, model.image_transform, batch_size=9)
    (batch,) = picked(batches, draw_rows(dataset.n_images, 9, seed=3))
    attack = PGD(threat=ThreatModel(eps=8 / 255), steps=2, seed=3)

    def recall_at_1(images: torch.Tensor) -> dict[str, float]:
        with torch.no_grad():
            scores = model.encode_image(images).features @ model.encode_text(model.tokenize(batch.texts)).features.T
        own = batch.group[:, None] == batch.text_group[None]
        tr = own.gather(1, scores.argmax(1, keepdim=True)).float().mean()
        ir = own.T.gather(1, scores.argmax(0)[:, None]).float().mean()
        return {"tr": pytest.approx(100 * float(tr), abs=1e-3), "ir": pytest.approx(100 * float(ir), abs=1e-3)}

    last = lines[-1]["validation"]
    assert last["clean"] == recall_at_1(batch.images)
    assert last["robust"] == recall_at_1(attack(model, batch).images)
    assert last["score"] == pytest.approx((last["robust"]["tr"] + last["robust"]["ir"]) / 2)
    assert last["metric"] == ("mean of TR@1 and IR@1 of 9 images and their captions under pgd (eps 8/255 linf, 1 word)")


def test_the_best_checkpoint_is_kept_and_found_again_after_a_stop(
    fastmat: Fastmat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores 5, 9, 9, a failure, 1: the first nine stays although one checkpoint alone is kept; a resumed run knows."""
    scores = iter([5.0, 9.0, 9.0, None, 1.0])

    def said(ranks: object) -> dict[str, float]:
        said.calls += 1
        if said.calls % 2:  # clean, then robust
            score = next(scores)
            if score is None:
                said.calls = 0
                raise UserError("the power went")
            said.score = score
        return {"tr": said.score, "ir": said.score}

    said.calls, said.score = 0, 0.0
    monkeypatch.setattr(validating, "rates_of", said)
    out, few = tmp_path / "run", "train={steps: 4, lr: 0.01, save_every: 1, keep_last: 1}"
    words = ("train", *RUN[:-1], few, *WATCHED, "--out", out)
    assert fastmat(*words)[0] == 2
    assert sorted(path.name for path in (out / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000004"]
    code, _, error = fastmat(*words, "--resume")
    assert code == 0, error
    assert [line["best"] for line in judged(out)] == [True, True, False, False]
    assert sorted(path.name for path in (out / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000004"]
    assert (out / "checkpoints" / "best").read_text() == "step-00000002"
    assert "step 2, score 9.0" in (out / "report.html").read_text()


@pytest.mark.parametrize("lost", ["nothing", "judgement"])
def test_a_resumed_run_says_and_weighs_the_same(fastmat: Fastmat, watched: Path, tmp_path: Path, lost: str) -> None:
    """From the middle; "judgement": it was killed while it judged the checkpoint it goes on from."""
    out = tmp_path / "run"
    shutil.copytree(watched, out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    (out / "model.safetensors").unlink()
    if lost == "judgement":
        lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
        (out / "log.jsonl").write_text("".join(x for x in lines if not ('"validation"' in x and '"step": 4' in x)))
    code, _, error = fastmat("train", *RUN, *WATCHED, "--out", out, "--resume")
    assert code == 0, error
    assert same_weights(watched, out)
    assert judged(out) == judged(watched)
    assert (out / "checkpoints" / "best").read_text() == (watched / "checkpoints" / "best").read_text()


def test_the_page_is_drawn_again(fastmat: Fastmat, watched: Path, tmp_path: Path) -> None:
    drawn = (watched / "report.html").read_text()
    (watched / "report.html").unlink()
    code, shown, error = fastmat("report", watched)
    assert code == 0 and shown.strip() == str(watched / "report.html"), error
    assert (watched / "report.html").read_text() == drawn
    code, _, error = fastmat("report", tmp_path)
    assert code == 2 and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("attack: universal", "validation.attack: universal must be fitted before it attacks"),
        ("attack: pdg", "did you mean 'pgd'?"),
        ("imagse: 5", "unknown key 'imagse'; did you mean 'images'?"),
        ("attack: bert_attack", "words are to be substituted: set mlm"),
        ("threat: {eps: 8}", "write 8/255"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(fastmat: Fastmat, tmp_path: Path, words: str, says: str) -> None:
    told = f"validation={{data: {{name: digits, split: val}}, {words}}}"
    code, _, error = fastmat("train", *RUN, told, "--out", tmp_path / "run")
    assert code == 2 and says in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
    code, _, error = fastmat("train", *RUN, "tracker=tensorbord", "--out", tmp_path / "run")
    assert code == 2 and "tracker" in error and len(error.strip().splitlines()) == 1


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_two_processes_judge_as_one(watched: Path, tmp_path: Path, engine: str) -> None:
    out = tmp_path / "run"
    sharded = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "DS_ACCELERATOR": "cpu"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(sharded if engine == "zero3" else {})}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastmat"]
    done = subprocess.run(
        [*launcher, "train", *RUN, *WATCHED, "--out", str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = judged(watched), judged(out)
    assert [(line["step"], line["validation"]["metric"]) for line in two] == [
        (line["step"], line["validation"]["metric"]) for line in one
    ]
    for a, b in zip(one, two, strict=True):  # AdamW blows rounding up: a rank or two may differ, of 9 images
        for kind in ("clean", "robust"):
            assert b["validation"][kind] == pytest.approx(a["validation"][kind], abs=100 / 9 + 0.1)
    assert (out / "report.html").exists() and (out / "checkpoints" / "best").exists()
