"""`fastmat task`: three tasks from their public formats, clean and attacked; what is kept; refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from annotated import write_coco_captions, write_refcoco, write_snli_ve
from tiny_generators import save_captioner
from two_processes import in_two_processes

from fastmat.attacks.pgd import PGD
from fastmat.evaluation.results import read_json
from fastmat.tasks.results import TaskExamples, TaskResults

Fastmat = Callable[..., tuple[int, str, str]]
COMMON = ["resamples=20", "examples=2", "batch_size=3", "threat.eps=8/255"]
CO_ATTACK = "attacks.co={name: co_attack, steps: 1, representation: fusion}"


def task(name: str, arguments: dict[str, str], **more: object) -> str:
    return f"task={json.dumps({'name': name, **arguments, **more})}"


@pytest.fixture
def grounding(tmp_path: Path) -> str:
    return task("grounding", write_refcoco(tmp_path / "refcoco"), layer=1)


@pytest.fixture
def entailment(tmp_path: Path) -> str:
    return task("entailment", write_snli_ve(tmp_path / "ve"))


@pytest.fixture
def captioning(tmp_path: Path) -> str:
    return task("captioning", write_coco_captions(tmp_path / "coco"))


def test_grounding_clean_attacked_and_resumed(
    fastmat: Fastmat, grounding: str, mlm_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["task", grounding, *COMMON, f"mlm={mlm_folder}", "victims.albef={model: {name: tiny_albef}}"]
    words += ["attacks.itm={name: pgd, steps: 1, objective: itm}", CO_ATTACK, "attacks.sga={name: sga, steps: 1}"]
    code, shown, error = fastmat(*words, "eps=[4/255]", "--out", out)
    assert code == 0, error
    results = read_json(out / "results.json", TaskResults)
    assert results.task == "grounding"
    assert [(row.attack, round(255 * row.threat.eps)) for row in results.rows] == [
        ("none", 0),
        *((attack, eps) for attack in ("itm", "co", "sga") for eps in (8, 4)),
    ]
    for row in results.rows:
        assert row.scoring == "grounding" and row.white_box and (row.n_rows, row.n_images) == (16, 4)
        assert set(row.values) == {"val", "testA", "testB"} and set(row.values) <= set(row.ci)
        assert (row.asr is None) == (row.attack == "none")
        assert row.max_distance <= 8 / 255 + 1e-6
    assert {row.attack for row in results.rows if row.max_words_changed} == {"co", "sga"}
    examples = read_json(out / "examples.json", TaskExamples).examples
    assert [example.setting.attack for example in examples] == ["itm"] * 2 + ["co"] * 2 + ["sga"] * 2
    page = (out / "report.html").read_text()
    assert "refcoco+, val+testA+testB: 16 rows, 4 images" in page and "Co-Attack" not in shown
    (out / "report.html").unlink()
    assert fastmat("report", out)[0] == 0
    assert (out / "report.html").read_text() == page
    # The same again keeps every row; another file of boxes keeps none.
    code, shown, error = fastmat(*words, "eps=[4/255]", "--out", out, "--resume")
    assert code == 0, error
    assert "7 of 7 rows kept" in shown
    boxes = tmp_path / "refcoco" / "dets.json"
    boxes.write_text(boxes.read_text().replace("0.9", "0.8"))
    code, shown, error = fastmat(*words, "--out", out, "--resume")
    assert code == 0, error
    assert "kept" not in shown
    assert not (out / "sets").exists()


def test_entailment_attacked_in_the_white_box_and_from_a_retrieval_model(
    fastmat: Fastmat, entailment: str, mlm_folder: Path, tmp_path: Path
) -> None:
    words = ["task", entailment, *COMMON, f"mlm={mlm_folder}", "victims.ve={model: {name: tiny_albef_ve}}"]
    logits = "attacks.logits={name: pgd, steps: 1, objective: kl_entailment}"
    code, shown, error = fastmat(*words, logits, CO_ATTACK, "--out", tmp_path / "white")
    assert code == 0, error
    rows = read_json(tmp_path / "white" / "results.json", TaskResults).rows
    assert [(row.attack, row.white_box, row.n_rows) for row in rows] == [
        ("none", True, 9),
        ("logits", True, 9),
        ("co", True, 9),
    ]
    # A random head gives one class to everything: a third is right, and intervals resample pictures.
    assert rows[0].values == {"accuracy": pytest.approx(100 / 3)} and rows[0].ci["accuracy"][0] <= 100 / 3
    assert "accuracy" in shown
    transfer = ["surrogates={itr: {name: tiny_albef}}", "attacks.sga={name: sga, steps: 1}"]
    code, _, error = fastmat(*words, *transfer, "--out", tmp_path / "transfer")
    assert code == 0, error
    row = read_json(tmp_path / "transfer" / "results.json", TaskResults).rows[1]
    assert (row.surrogate, row.victim, row.white_box) == ("itr", "ve", False)


def test_captioning_by_its_own_loss_and_from_a_retrieval_model(
    fastmat: Fastmat, captioning: str, tmp_path: Path
) -> None:
    model = f"{{name: blip_captioner, path: {save_captioner(tmp_path / 'captioner')}, prompt: a}}"
    words = ["task", captioning, *COMMON, f"victims.blip={{model: {model}}}"]
    attacks = ["attacks.own={name: apgd, steps: 3, objective: caption_loss}"]
    code, _, error = fastmat(*words, *attacks, "--out", tmp_path / "white")
    assert code == 0, error
    rows = read_json(tmp_path / "white" / "results.json", TaskResults).rows
    assert [row.attack for row in rows] == ["none", "own"]
    assert list(rows[0].values) == ["cider", "bleu1", "bleu2", "bleu3", "bleu4"]
    assert rows[0].asr is rows[1].asr is None and rows[0].n_rows == 5
    assert rows[0].values != rows[1].values
    examples = read_json(tmp_path / "white" / "examples.json", TaskExamples).examples
    assert any(example.said_before != example.said_after for example in examples)
    transfer = ["surrogates={itr: {name: tiny_blip}}", "attacks.pgd={name: pgd, steps: 1}", "eps=[4/255]"]
    transfer.append("attacks.noise={name: corruption, kind: gaussian_noise}")
    code, shown, error = fastmat(*words, *transfer, "--out", tmp_path / "transfer")
    assert code == 0, error
    rows = read_json(tmp_path / "transfer" / "results.json", TaskResults).rows
    assert [row.attack for row in rows] == ["none", "pgd", "pgd", "noise"] and rows[1].max_distance > 0
    assert shown.count("no budget") == 1
    examples = read_json(tmp_path / "transfer" / "examples.json", TaskExamples).examples
    assert [example.setting.attack for example in examples] == ["pgd"] * 2 + ["noise"] * 2


def test_what_a_stopped_run_had_attacked_is_not_attacked_again(
    fastmat: Fastmat, entailment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["task", entailment, *COMMON, "victims.ve={model: {name: tiny_albef_ve}}", "--out", tmp_path / "out"]
    words.append("attacks.logits={name: pgd, steps: 1, objective: kl_entailment}")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fastmat.cli.judging.judge_attacked", stop)
        code, _, error = fastmat(*words)
    assert code == 130 and "with --resume goes on" in error
    assert [row.attack for row in read_json(tmp_path / "out" / "results.json", TaskResults).rows] == ["none"]
    monkeypatch.setattr(PGD, "run", stop)
    code, shown, error = fastmat(*words, "--resume")
    assert code == 0, error
    assert "1 of 2 rows kept" in shown
    assert not (tmp_path / "out" / "sets").exists()


def test_kept_sets_are_no_retrieval_sets(fastmat: Fastmat, entailment: str, tmp_path: Path) -> None:
    words = ["task", entailment, *COMMON, "victims.ve={model: {name: tiny_albef_ve}}", "keep_sets=true", "limit=2"]
    attack = "attacks.logits={name: pgd, steps: 1, objective: kl_entailment}"
    assert fastmat(*words, attack, "--out", tmp_path / "out")[0] == 0
    (kept,) = (tmp_path / "out" / "sets" / "ve").iterdir()
    code, _, error = fastmat("export", kept, "--out", tmp_path / "png")
    assert code == 2 and "holds rows of a task" in error


def test_the_first_rows_alone(fastmat: Fastmat, entailment: str, tmp_path: Path) -> None:
    words = ["task", entailment, *COMMON, "victims.ve={model: {name: tiny_albef_ve}}", "--out", tmp_path / "out"]
    assert fastmat(*words, "limit=4")[0] == 0
    assert read_json(tmp_path / "out" / "results.json", TaskResults).rows[0].n_rows == 4
    code, _, error = fastmat(*words[:-1], tmp_path / "more", "limit=10")
    assert code == 2 and "limit: snli-ve/test has 9 images, cannot take 10" in error


@pytest.mark.distributed
def test_two_processes_attack_to_the_result_of_one(
    fastmat: Fastmat, grounding: str, mlm_folder: Path, tmp_path: Path
) -> None:
    words = ["task", grounding, *COMMON, f"mlm={mlm_folder}", "victims.albef={model: {name: tiny_albef}}", CO_ATTACK]
    assert fastmat(*words, "--out", tmp_path / "one")[0] == 0
    ended = in_two_processes([*words, "--out", tmp_path / "two"])
    assert ended.returncode == 0, ended.stderr
    one, two = (read_json(tmp_path / name / "results.json", TaskResults).rows for name in ("one", "two"))
    assert [row.model_dump(exclude={"seconds"}) for row in one] == [row.model_dump(exclude={"seconds"}) for row in two]
    assert ended.stdout.count("report.html") == 1


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("grounding", ["victims.v={model: {name: tiny}}"], "victims.v.model: DualEncoder does not look at images with"),
        ("entailment", ["victims.v={model: {name: tiny_albef}}"], "victims.v.model: Albef has no head that tells"),
        ("captioning", ["victims.v={model: {name: tiny_blip}}"], "victims.v.model: Blip writes no captions"),
        (
            "entailment",
            ["victims.v={model: {name: tiny_albef_ve}}", "attacks.a={name: pgd}"],
            "attacks.a: a model for entailment has no features that compare images with texts",
        ),
        (
            "entailment",
            ["victims.v={model: {name: tiny_albef_ve}}", "attacks.a={name: strongest}"],
            "attacks.a: strongest is several attacks",
        ),
        ("grounding", ["victims.v={model: {name: tiny_albef}}", "task.layer=2"], "layer must be 0 to 1"),
        ("grounding", ["victims.v={model: {name: tiny_albef}}", "task.detections=no.json"], "no.json: no such file"),
        ("grounding", ["victims={}"], "victims: "),
        ("grounding", ["victims.v={model: {name: tiny_albef}}", "task.name=pointing"], "unknown name 'pointing'"),
    ],
)
def test_refusals(
    name: str,
    words: list[str],
    said: str,
    request: pytest.FixtureRequest,
    fastmat: Fastmat,
    mlm_folder: Path,
    tmp_path: Path,
) -> None:
    words = [request.getfixturevalue(name), *COMMON, f"mlm={mlm_folder}", *words]
    code, _, error = fastmat("task", *words, "--out", tmp_path / "out")
    assert code == 2
    assert said in error and len(error.strip().splitlines()) == 1
