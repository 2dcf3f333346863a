"""Zero-shot classification: accuracy by a plain loop, the worst case, the built-in labels from end to end, refusals."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cli.conftest import fastmat as fastmat
from PIL import Image
from two_processes import in_two_processes

from fastmat.attacks.apgd_classes import APGDClasses
from fastmat.attacks.base import Attack
from fastmat.attacks.pgd import PGD
from fastmat.data.labelled import labelled_digits
from fastmat.data.loader import evaluation_batches
from fastmat.errors import UserError
from fastmat.evaluation.results import read_json
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.small import small_clip
from fastmat.models.tiny import tiny_clip
from fastmat.models.tiny_fusion import tiny_albef, tiny_albef_ve
from fastmat.models.weights import load_weights, save_weights
from fastmat.tasks.base import Classifying, Judged
from fastmat.tasks.results import TaskExamples, TaskResults
from fastmat.tasks.zero_shot import ZeroShot

Fastmat = Callable[..., tuple[int, str, str]]
MODEL = "{name: small, vocabulary: null, widths: [16, 32], text_width: 32, layers: 1, embed_dim: 32}"
DIGITS = "task={name: zero_shot, data: {name: labelled_digits, split: val, label: colour}}"
COMMON = [DIGITS, "resamples=50", "examples=2", "batch_size=16", "limit=32", "threat={eps: 8/255, max_words: 0}"]
APGD = "attacks.apgd={name: apgd_classes, steps: 5, restarts: 1, targets: 2}"
PGD_DLR = "attacks.dlr={name: pgd, steps: 3, objective: dlr}"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained for some steps to tell the first colour."""
    model = small_clip(vocabulary=None, widths=(16, 32), text_width=32, layers=1, embed_dim=32)
    data = labelled_digits("train", label="colour")
    images = torch.stack([model.image_transform(data.load(row)) for row in range(512)]).float() / 255
    labels = torch.tensor(data.group[:512])
    prompts = [data.captions[data.group.index(label)][0] for label in range(8)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for rows in torch.randint(512, (60, 64), generator=torch.Generator().manual_seed(0)):
        encoded = model(images[rows], model.tokenize(prompts))
        logits = model.logit_scale * encoded.image.features @ encoded.text.features.T
        optimiser.zero_grad()
        F.cross_entropy(logits, labels[rows]).backward()
        optimiser.step()
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(model, file)
    return file


def victim(weights: Path) -> str:
    return f"victims.small={{model: {MODEL[:-1]}, weights: {weights}}}}}"


def plain_accuracy(model: DualEncoder, task: ZeroShot, n: int) -> list[bool]:
    """One picture and one prompt at a time."""
    right, classes = [], {}
    with torch.no_grad():
        for group, prompts in dict(zip(task.data.group, task.data.captions, strict=True)).items():
            units = [model.encode_text(model.tokenize([prompt])).features[0] for prompt in prompts]
            mean = sum(units) / len(units)
            classes[group] = mean / mean.norm()
        for row in range(n):
            picture = model.image_transform(task.data.load(row))[None].float() / 255
            image = model.encode_image(picture).features[0]
            scores = {group: float(image @ unit) for group, unit in classes.items()}
            right.append(max(scores, key=scores.__getitem__) == task.data.group[row])
    return right


def test_accuracy_is_that_of_a_plain_loop_over_the_means_of_prompts() -> None:
    data = labelled_digits("test", label="digit", templates=("a picture of a {}", "the {} on a dark ground", "{}"))
    task, model = ZeroShot(data=replace(data, group=tuple(3 * label + 4 for label in data.group))), tiny_clip().eval()
    judged = task.judge(model, evaluation_batches(task.data.take(30), model.image_transform, batch_size=8))
    expected = plain_accuracy(model, task, 30)
    assert judged.right is not None and judged.right.tolist() == expected and 0 < sum(expected) < 30
    (metric,) = judged.metrics.values()
    assert float(metric.value(metric.sums.sum(0))) == pytest.approx(100 * sum(expected) / 30)
    assert [said == wanted for said, wanted in zip(judged.said, task.wanted, strict=False)] == expected
    assert task.wanted[:2] == tuple(captions[0] for captions in data.captions[:2])


def test_classes_are_encoded_once_and_are_what_attacks_contrast_with(monkeypatch: pytest.MonkeyPatch) -> None:
    task, model = ZeroShot(data=labelled_digits("val", label="colour", templates=("a {}", "the {}"))), tiny_clip()
    encoded = []
    plain = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda tokens: encoded.append(len(tokens.ids)) or plain(tokens))
    batches = evaluation_batches(task.data.take(8), model.image_transform, batch_size=4)
    context = task.context(model, batches)
    assert task.context(model, batches) is context and model.training
    task.judge(model, batches)
    assert encoded == [16]
    assert context.text_features.shape == (8, 16) and context.text_group.tolist() == list(range(8))
    torch.testing.assert_close(context.text_features.norm(dim=1), torch.ones(8))
    assert context.image_group.tolist() == list(task.data.group[:8]) and len(context.image_features) == 8
    assert isinstance(task, Classifying)


def test_the_built_in_labels_from_end_to_end(
    fastmat: Fastmat, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["task", *COMMON, victim(weights), APGD, PGD_DLR, "eps=[1/255]", "--out", tmp_path / "out"]
    told: dict[tuple[str, int], torch.Tensor] = {}

    def keep(label: str, kind: type[Attack], patched: pytest.MonkeyPatch) -> None:
        plain = kind.run

        def run(self: Attack, model, batch, context, draws):
            images, texts = plain(self, model, batch, context, draws)
            with torch.no_grad():
                nearest = (model.encode_image(images).features @ context.text_features.T).argmax(1)
            radius = round(255 * self.threat.eps)
            right = context.text_group[nearest] == batch.group
            told[label, radius] = torch.cat([told.get((label, radius), right[:0]), right])
            return images, texts

        patched.setattr(kind, "run", run)

    with monkeypatch.context() as patched:
        keep("apgd", APGDClasses, patched)
        keep("dlr", PGD, patched)
        code, shown, error = fastmat(*words)
    assert code == 0, error
    results = read_json(tmp_path / "out" / "results.json", TaskResults)
    assert results.task == "zero_shot"
    found = {(row.attack, round(255 * row.threat.eps)): row for row in results.rows}
    assert list(found) == [
        ("none", 0),
        *((attack, eps) for attack in ("apgd", "dlr") for eps in (8, 1)),
        ("worst case", 8),
        ("worst case", 1),
    ]
    clean = found["none", 0]
    assert clean.values["accuracy"] > 40 and (clean.n_rows, clean.n_images, clean.scoring) == (32, 32, "zero_shot")
    for (attack, eps), row in found.items():
        low, high = row.ci["accuracy"]
        assert (low <= row.values["accuracy"] <= high and low < high) or row.values["accuracy"] == 0
        if attack in ("apgd", "dlr"):
            assert row.values["accuracy"] == pytest.approx(100 * float(told[attack, eps].float().mean()))
    # The 32 pictures are judged right before and after each attack.
    model = small_clip(vocabulary=None, widths=(16, 32), text_width=32, layers=1, embed_dim=32)
    load_weights(model, weights)
    task = ZeroShot(data=labelled_digits("val", label="colour"))
    before = torch.tensor(plain_accuracy(model.eval(), task, 32))
    for eps in (8, 1):
        survived = before & told["apgd", eps] & told["dlr", eps]
        worst = found["worst case", eps]
        assert worst.values["accuracy"] == pytest.approx(100 * float(survived.float().mean()))
        assert worst.asr == pytest.approx(100 * float((before & ~survived).sum() / before.sum()))
        assert worst.max_distance == max(found[attack, eps].max_distance for attack in ("apgd", "dlr"))
    assert found["apgd", 8].values["accuracy"] < found["apgd", 1].values["accuracy"] < clean.values["accuracy"]
    examples = read_json(tmp_path / "out" / "examples.json", TaskExamples).examples
    assert [example.setting.attack for example in examples] == ["apgd"] * 2 + ["dlr"] * 2
    assert examples[0].wanted.startswith("a picture of a ") and examples[0].text_after == examples[0].wanted
    page = (tmp_path / "out" / "report.html").read_text()
    assert "digits by colour, val: 32 rows, 32 images" in page and "worst case" in page and "worst case" in shown
    # Nothing is attacked again, not even for a worst case over other attacks.
    monkeypatch.setattr(PGD, "run", None)
    monkeypatch.setattr(APGDClasses, "run", None)
    code, shown, error = fastmat(*words, "--resume")
    assert code == 0, error
    assert "7 of 7 rows kept" in shown
    assert len(list((tmp_path / "out" / "right").iterdir())) == 4


def test_a_stopped_run_goes_on_and_what_is_lost_is_made_again(
    fastmat: Fastmat, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["task", *COMMON, victim(weights), APGD, PGD_DLR]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PGD, "run", stop)
        assert fastmat(*words, "--out", tmp_path / "stopped")[0] == 130
    assert fastmat(*words, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr(APGDClasses, "run", stop)
        code, shown, error = fastmat(*words, "--out", tmp_path / "stopped", "--resume")
        assert code == 0, error
    assert "2 of 4 rows kept" in shown
    one, two = (read_json(tmp_path / name / "results.json", TaskResults).rows for name in ("whole", "stopped"))
    assert [row.model_dump(exclude={"seconds"}) for row in one] == [row.model_dump(exclude={"seconds"}) for row in two]
    # An attack that was alone, and so kept nothing for a worst case, is made again beside another.
    assert fastmat(*words[:-1], "--out", tmp_path / "more")[0] == 0
    code, shown, error = fastmat(*words, "--out", tmp_path / "more", "--resume")
    assert code == 0, error
    assert "1 of 4 rows kept" in shown
    more = read_json(tmp_path / "more" / "results.json", TaskResults).rows
    assert [(row.attack, row.values) for row in more] == [(row.attack, row.values) for row in one]


def test_transfer_and_one_attack_alone(fastmat: Fastmat, weights: Path, tmp_path: Path) -> None:
    words = ["task", *COMMON, victim(weights), "victims.albef={model: {name: tiny_albef}}", PGD_DLR]
    words += ["surrogates={tiny: {name: tiny}}", "threat.eps=64/255"]
    code, shown, error = fastmat(*words, "--out", tmp_path / "out")
    assert code == 0, error
    rows = read_json(tmp_path / "out" / "results.json", TaskResults).rows
    assert [(row.victim, row.attack, row.white_box) for row in rows] == [
        ("small", "none", True),
        ("albef", "none", True),
        ("small", "dlr", False),
        ("albef", "dlr", False),
    ]
    assert "worst case" not in shown and not (tmp_path / "out" / "right").exists()


def test_a_picture_that_was_wrong_before_survives_nothing(
    fastmat: Fastmat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attacks on another model put some answers of one that guesses right by chance."""
    told: list[torch.Tensor] = []
    plain = ZeroShot.judge

    def judge(*arguments: Any) -> Judged:
        judged = plain(*arguments)
        assert judged.right is not None
        told.append(judged.right)
        return judged

    monkeypatch.setattr(ZeroShot, "judge", judge)
    words = [
        "task",
        *COMMON,
        "victims.t={model: {name: tiny, seed: 1}}",
        PGD_DLR,
        "attacks.margin={name: pgd, steps: 3, objective: margin}",
    ]
    words += ["surrogates={tiny: {name: tiny}}", "threat.eps=32/255", "limit=128"]
    code, _, error = fastmat(*words, "--out", tmp_path / "out")
    assert code == 0, error
    clean, first, second = told
    assert (first & second & ~clean).any() and (first & ~second).any()
    rows = {row.attack: row for row in read_json(tmp_path / "out" / "results.json", TaskResults).rows}
    share = (clean & first & second).float().mean()
    assert rows["worst case"].values["accuracy"] == pytest.approx(100 * float(share))
    assert not rows["worst case"].white_box


@pytest.mark.distributed
def test_two_processes_attack_to_the_result_of_one(fastmat: Fastmat, weights: Path, tmp_path: Path) -> None:
    words = ["task", *COMMON, victim(weights), APGD, PGD_DLR]
    assert fastmat(*words, "--out", tmp_path / "one")[0] == 0
    ended = in_two_processes([*words, "--out", tmp_path / "two"])
    assert ended.returncode == 0, ended.stderr
    one, two = (read_json(tmp_path / name / "results.json", TaskResults).rows for name in ("one", "two"))
    assert [row.model_dump(exclude={"seconds"}) for row in one] == [row.model_dump(exclude={"seconds"}) for row in two]


def test_models_without_features_of_images_and_texts_are_refused() -> None:
    task = ZeroShot(data=labelled_digits("val"))
    task.check(tiny_clip())
    task.check(tiny_albef())
    with pytest.raises(UserError, match="has no features that compare images with class prompts"):
        task.check(tiny_albef_ve())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task.data={name: digits, split: val}"], "task: the captions of digits/val are no class labels"),
        (
            ["task.data={name: labelled_digits, split: dev}"],
            "task: data.split: input should be 'train', 'val' or 'test', got 'dev'",
        ),
        (["task.data={name: torchvision, which: cifar10, root: FOLDER}"], "there is no 'cifar-10-batches-py' in it"),
        (
            ["task.data={name: torchvision, which: cifar, root: FOLDER}"],
            "task: data.which: input should be 'caltech101'",
        ),
        (
            ["task.data={name: image_folder, folder: FOLDER, title: two, split: test, names: FOLDER/names.json}"],
            "class 'b'",
        ),
        (
            [
                "task.data={name: image_folder, folder: FOLDER, title: two, split: test}",
                "attacks.a={name: apgd_classes}",
                "limit=null",
            ],
            "the targeted difference of logits ratio needs 4 classes, here are 2",
        ),
        (["task={name: zero_shot}"], "'data' is missing"),
        (["victims.v={model: {name: tiny_albef_ve}}"], "victims.v.model: "),
        (
            ["attacks.a={name: text_perturbation, kind: keyboard, severity: 5}", "threat.max_words=1"],
            "of a class prompt, but zero_shot attacks none",
        ),
    ],
)
def test_refusals(words: list[str], said: str, fastmat: Fastmat, tmp_path: Path) -> None:
    for name in ("a/0", "a/1", "b/0"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "set" / f"{name}.png")
    (tmp_path / "set" / "names.json").write_text(json.dumps({"a": "ant"}))
    words = [word.replace("FOLDER", str(tmp_path / "set")) for word in words]
    code, _, error = fastmat("task", *COMMON, "victims.t={model: {name: tiny}}", *words, "--out", tmp_path / "out")
    assert code == 2, error
    assert said in error and len(error.strip().splitlines()) == 1
