"""`attack`, `train`, `eval` and `report` on a real set on disk, in this process."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_mlm import tiny_parts
from torch import Tensor

from fastmat.attacks import bert_attack, pgd
from fastmat.cli.showcase import Showcase
from fastmat.evaluation.results import read_examples, read_results
from fastmat.training import loop

Fastmat = Callable[..., tuple[int, str, str]]
ATTACK = ["model=tiny", "attack={name: pgd, steps: 2}", "threat.eps=8/255", "shard_size=2", "batch_size=2"]
TRAIN = ["model=tiny", "train={steps: 4, save_every: 2, lr: 1e-2}", "batch_size=3"]
EVAL = ["victims.plain.model=tiny", "resamples=20", "examples=2"]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Ctrl-C arrives during the `call`-th call of a function; the function is restored at the next `undo`."""
    original: Callable[..., object] = getattr(owner, name)
    count = 0

    def counting(*values: object, **named: object) -> object:
        nonlocal count
        count += 1
        if count == call:
            signal.raise_signal(signal.SIGINT)
        return original(*values, **named)

    monkeypatch.setattr(owner, name, counting)


def images_of(folder: Path) -> Tensor:
    return torch.cat([load_file(path)["images"] for path in sorted(folder.glob("images-*.safetensors"))])


def test_attack_writes_a_set_and_never_over_one(fastmat: Fastmat, settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "set"
    code, shown, _ = fastmat("attack", *settings, *ATTACK, "--out", out)
    assert code == 0
    assert "6 images and 12 captions" in shown
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["surrogate"], manifest["attack"], manifest["dataset"], len(manifest["shards"])) == (
        "tiny",
        "pgd",
        "six",
        3,
    )
    assert manifest["threat"]["eps"] == 8 / 255
    assert "batch_size" not in manifest["config"]

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, error = fastmat("attack", *settings, *ATTACK, "--out", out)
    assert code == 2
    assert "exists and is not empty" in error
    code, _, error = fastmat("attack", *settings, *ATTACK, "--out", out, "--resume")
    assert code == 2
    assert "finished" in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_overrides_may_stand_on_both_sides_of_options(fastmat: Fastmat, settings: list[str], tmp_path: Path) -> None:
    words = [*settings, "--out", tmp_path / "set", *ATTACK, "limit=2", "--resume"]
    assert "has no manifest.json to go on with" in fastmat("attack", *words)[2]
    assert fastmat("attack", *words[:-1])[0] == 0
    assert len(images_of(tmp_path / "set")) == 2


def test_interrupted_attack_goes_on_to_the_same_set(
    fastmat: Fastmat, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fastmat("attack", *settings, *ATTACK, "--out", whole)[0] == 0
    interrupt_at(monkeypatch, pgd.PGD, "run", 2)
    code, _, error = fastmat("attack", *settings, *ATTACK, "--out", parts)
    assert code == 130
    assert f"4 of 6 images are saved in {parts}; the same command with --resume goes on" in error
    monkeypatch.undo()
    assert fastmat("attack", *settings, *ATTACK, "--out", parts, "--resume")[0] == 0
    assert torch.equal(images_of(whole), images_of(parts))
    assert (whole / "texts.jsonl").read_bytes() == (parts / "texts.jsonl").read_bytes()

    code, _, error = fastmat("attack", *settings, *ATTACK, "seed=1", "--out", tmp_path / "none", "--resume")
    assert code == 2
    assert "has no manifest.json to go on with" in error


def test_a_set_is_not_continued_with_another_language_model(
    fastmat: Fastmat, settings: list[str], mlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*settings, *ATTACK, "attack=bert_attack", f"mlm={tmp_path / 'mlm'}", "--out", tmp_path / "set"]
    shutil.copytree(mlm_folder, tmp_path / "mlm")
    with monkeypatch.context() as patch:
        interrupt_at(patch, bert_attack.BertAttack, "run", 2)
        assert fastmat("attack", *words)[0] == 130
    model, _ = tiny_parts(seed=1)
    model.save_pretrained(tmp_path / "mlm")
    code, _, error = fastmat("attack", *words, "--resume")
    assert code == 2
    assert "another" in error


def test_text_attack_through_the_command(fastmat: Fastmat, settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "set"
    words = ["model=tiny", "attack={name: sga, steps: 1, scales: [0.5]}", "limit=3"]
    assert fastmat("attack", *settings, *words, "--out", out)[0] == 0
    lines = [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert sum(line["words_changed"] for line in lines) > 0
    assert all(line["words_changed"] <= 1 for line in lines)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["attack.stepz=3"], "command line: attack: unknown key 'stepz'; did you mean 'steps'?"),
        (["threat.eps=2"], "write 2/255"),
        (["attack=sga", "mlm=null"], "set mlm to a transformers BertForMaskedLM"),
        (["device=cuda:99"], "device: 'cuda:99' is not here"),
        (["model={name: tiny, weights: nowhere.safetensors}"], "nowhere.safetensors does not exist"),
        (["model={name: open_clip, architecture: ViT-B16}"], "did you mean 'ViT-B-16'?"),
        (["data.annotations=nowhere.json"], "nowhere.json"),
        (["limit=7"], "limit: six/test has 6 images, cannot take 7"),
        (["seed=-1"], "seed: input should be greater than or equal to 0, got -1"),
        (["batch_size=0"], "batch_size: input should be greater than 0, got 0"),
    ],
)
def test_what_cannot_run_leaves_nothing(
    fastmat: Fastmat, settings: list[str], tmp_path: Path, words: list[str], sentence: str
) -> None:
    code, _, error = fastmat("attack", *settings, *ATTACK, *words, "--out", tmp_path / "out")
    assert code == 2
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_and_broken_images_are_named(
    fastmat: Fastmat, pictures: Path, settings: list[str], tmp_path: Path
) -> None:
    copy = tmp_path / "set"
    shutil.copytree(pictures, copy)
    (copy / "images" / "3.png").write_bytes(b"not a picture")
    words = [*settings, *ATTACK, f"data.images={copy}", f"data.annotations={copy / 'test.json'}"]
    code, _, error = fastmat("attack", *words, "--out", tmp_path / "out")
    assert code == 2
    assert "3.png" in error
    (copy / "images" / "3.png").unlink()
    code, _, error = fastmat("attack", *words, "--out", tmp_path / "out")
    assert code == 2
    assert "3.png" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("defence", ["finetune", "{name: tecoa_itr, steps: 1}", "{name: mat, steps: 1}"])
def test_train_writes_weights(fastmat: Fastmat, settings: list[str], tmp_path: Path, defence: str) -> None:
    code, shown, _ = fastmat("train", *settings, *TRAIN, f"defence={defence}", "--out", tmp_path / "run")
    assert code == 0
    assert shown.startswith("4 steps of")
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == [4]


def test_interrupted_training_goes_on_to_the_same_weights(
    fastmat: Fastmat, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = [*settings, *TRAIN, "defence={name: tecoa_itr, steps: 1}"]
    assert fastmat("train", *words, "--out", whole)[0] == 0
    interrupt_at(monkeypatch, loop, "encode_views", 3)
    code, _, error = fastmat("train", *words, "--out", parts)
    assert code == 130
    assert "the same command with --resume goes on" in error
    assert not (parts / "model.safetensors").exists()
    monkeypatch.undo()
    assert fastmat("train", *words, "--out", parts, "--resume")[0] == 0
    expected, found = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    code, _, error = fastmat("train", *words, "seed=1", "--out", parts, "--resume")
    assert code == 2
    assert "belongs to another run" in error


def test_eval_of_two_victims_attacks_and_a_stored_set(fastmat: Fastmat, settings: list[str], tmp_path: Path) -> None:
    stored, out = tmp_path / "set", tmp_path / "eval"
    assert fastmat("attack", *settings, *ATTACK, "--out", stored)[0] == 0
    words = ["victims.other={model: {name: tiny, seed: 1}, defence: mat}", "threat.eps=8/255", "eps=[4/255]"]
    words += ["attacks.words=bert_attack", "attacks.pixels={name: pgd, steps: 2}", f"sets=[{stored}]"]
    code, shown, _ = fastmat("eval", *settings, *EVAL, *words, "--out", out)
    assert code == 0
    results = read_results(out)
    found = [(r.surrogate, r.victim, r.defence, r.attack, round(r.threat.eps * 255)) for r in results.rows]
    assert found == [
        ("plain", "plain", "none", "none", 0),
        ("plain", "plain", "none", "words", 8),
        ("plain", "plain", "none", "pixels", 8),
        ("plain", "plain", "none", "pixels", 4),
        ("tiny", "plain", "none", "pgd", 8),
        ("other", "other", "mat", "none", 0),
        ("other", "other", "mat", "words", 8),
        ("other", "other", "mat", "pixels", 8),
        ("other", "other", "mat", "pixels", 4),
        ("tiny", "other", "mat", "pgd", 8),
    ]
    pixels, same = results.rows[2], results.rows[4]
    assert (pixels.white_box, same.white_box, results.rows[-1].white_box) == (True, True, False)
    how = {"surrogate", "attack", "seconds", "pairs_per_s", "inputs"}
    assert pixels.model_dump(exclude=how) == same.model_dump(exclude=how)  # stored or made now
    assert pixels.max_distance == pytest.approx(8 / 255, abs=1e-6)
    assert "other (from tiny)" in shown
    assert len(read_examples(out / "examples.json").examples) == 4
    assert "<!DOCTYPE html>" in (out / "report.html").read_text()

    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert fastmat("report", out) == (0, f"{out / 'report.html'}\n", "")
    assert (out / "report.html").read_bytes() == page


def test_surrogates_by_attacks_by_victims(
    fastmat: Fastmat, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "victims.other.model={name: tiny, seed: 1, image_size: 48}",
        "surrogates={own: {name: tiny, seed: 2}, copy: {name: tiny, seed: 1, image_size: 48}}",
        "attacks={pgd: {name: pgd, steps: 1}, words: bert_attack}",
    ]
    calls = count_calls(monkeypatch, pgd.PGD, "run")
    code, shown, _ = fastmat("eval", *settings, *EVAL, *words, "--out", tmp_path / "eval")
    assert code == 0
    assert len(calls) == 2 * 2  # once on each surrogate, in two batches, whatever the number of victims
    rows = read_results(tmp_path / "eval").rows
    assert [(row.surrogate, row.victim, row.white_box, row.attack) for row in rows] == [
        ("plain", "plain", True, "none"),
        ("other", "other", True, "none"),
        *(
            (surrogate, victim, (surrogate, victim) == ("copy", "other"), attack)
            for surrogate in ("own", "copy")
            for attack in ("pgd", "words")
            for victim in ("plain", "other")
        ),
    ]
    assert rows[2].max_distance == rows[3].max_distance
    assert shown.count("pgd *") == shown.count("* white box: through") == 1
    assert (tmp_path / "eval" / "report.html").read_text().count('class="matrix"') == 2
    assert len(read_examples(tmp_path / "eval" / "examples.json").examples) == 2 * 2  # of the first surrogate


def test_an_expensive_attack_on_some_images_in_the_whole_gallery(
    fastmat: Fastmat, settings: list[str], tmp_path: Path
) -> None:
    words = [*settings, *EVAL, "attacks={all: {name: pgd, steps: 1}, some: {name: pgd, steps: 1}}", "threat.eps=8/255"]
    assert fastmat("eval", *words, "subset.some=3", "keep_sets=true", "--out", tmp_path / "eval")[0] == 0
    rows = read_results(tmp_path / "eval").rows
    assert [(row.attack, row.n_images, row.n_captions, row.gallery_images) for row in rows] == [
        ("none", 6, 12, None),
        ("none", 3, 6, 6),
        ("all", 6, 12, None),
        ("some", 3, 6, 6),
    ]
    (of_some,), (of_all,) = ((tmp_path / "eval" / "sets" / "plain").glob(f"{name}-*") for name in ("some", "all"))
    chosen = json.loads((of_some / "manifest.json").read_text())["source"]["rows"]
    # The noise of an image is its own, whether the others are attacked or not.
    torch.testing.assert_close(images_of(of_some), images_of(of_all)[chosen], atol=1e-6, rtol=0)
    code, _, error = fastmat("eval", *words, "subset.same=3", "--out", tmp_path / "none")
    assert code == 2
    assert "subset: 'same' is no label of attacks; did you mean 'some'?" in error


def test_interrupted_eval_keeps_its_rows(
    fastmat: Fastmat, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = [*settings, *EVAL, "attacks.a={name: pgd, steps: 1}", "attacks.b={name: pgd, steps: 2}"]
    assert fastmat("eval", *words, "--out", whole)[0] == 0
    interrupt_at(monkeypatch, pgd.PGD, "run", 3)  # two batches each: the second attack's first
    code, _, error = fastmat("eval", *words, "--out", parts)
    assert code == 130
    assert "the same command with --resume goes on" in error
    assert [row.attack for row in read_results(parts).rows] == ["none", "a"]
    (begun,) = (parts / "sets" / "plain").glob("b-*/manifest.json")
    assert sum(shard["rows"] for shard in json.loads(begun.read_text())["shards"]) == 4
    monkeypatch.undo()
    interrupt_at(monkeypatch, pgd.PGD, "run", 2)  # what the first run had attacked is not attacked again
    code, shown, _ = fastmat("eval", *words, "batch_size=2", "--out", parts, "--resume")
    assert code == 0
    assert "inputs unchanged: 2 of 3 rows kept, 1 adversarial sets taken up" in shown
    assert expected_rows(whole) == expected_rows(parts)
    assert not (parts / "sets").exists()


def test_a_killed_eval_goes_on_within_the_attack(
    fastmat: Fastmat, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Nothing is tidied up for it."""

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = [*settings, *EVAL, "attacks.a={name: pgd, steps: 2}", "threat.eps=8/255", "batch_size=1"]
    assert fastmat("eval", *words, "--out", whole)[0] == 0
    calls = count_calls(monkeypatch, pgd.PGD, "run", dies=(4, Killed))
    with pytest.raises(Killed):
        fastmat("eval", *words, "--out", parts)
    code, shown, _ = fastmat("eval", *words, "--out", parts, "--resume")
    assert code == 0
    assert len(calls) == 4 + 3  # the fourth came to nothing
    assert "1 of 2 rows kept, 1 adversarial sets taken up" in shown
    assert expected_rows(whole) == expected_rows(parts)


def expected_rows(folder: Path) -> list[dict[str, object]]:
    return [row.model_dump(exclude={"seconds", "pairs_per_s"}) for row in read_results(folder).rows]


def test_a_resumed_eval_makes_anew_only_what_has_other_inputs(
    fastmat: Fastmat, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "eval"
    words = [*settings, *EVAL, "attacks.a={name: pgd, steps: 1}", "--out", out]
    assert fastmat("eval", *words, "attacks.b={name: pgd, steps: 2}")[0] == 0
    first = read_results(out)
    changed = ["attacks.b={name: pgd, steps: 3}", "attacks.c={name: pgd, steps: 2}", "batch_size=3"]
    calls = count_calls(monkeypatch, pgd.PGD, "run")
    code, shown, _ = fastmat("eval", *words, *changed, "--resume")
    assert code == 0
    assert "inputs unchanged: 2 of 4 rows kept" in shown
    second = read_results(out)
    assert [row.attack for row in second.rows] == ["none", "a", "b", "c"]
    assert second.rows[:2] == first.rows[:2]
    assert second.rows[2].inputs != first.rows[2].inputs
    assert len(calls) == 4  # b and c, two batches each
    assert {example.setting.attack for example in read_examples(out / "examples.json").examples} == {"c"}

    assert fastmat("eval", *words, "resamples=30", "keep_sets=true", "--resume")[0] == 0  # a row's, not a set's input
    assert [row.attack for row in read_results(out).rows] == ["none", "a"]
    assert len(calls) == 6
    assert fastmat("eval", *words, "resamples=40", "victims.other={model: {name: tiny, seed: 1}}", "keep_sets=true",
                   "--resume")[0] == 0  # fmt: skip
    assert len(calls) == 8  # the kept set is judged again; the new victim's own gradients make another
    assert len(list(out.glob("sets/*/a-*/manifest.json"))) == 2


def test_how_an_attack_is_executed_is_no_input_but_its_precision_is(
    fastmat: Fastmat, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    words = [*settings, *EVAL, "attacks.a={name: pgd, steps: 1}", "threat.eps=8/255"]
    assert fastmat("eval", *words, "--out", plain)[0] == 0
    calls = count_calls(monkeypatch, pgd.PGD, "run")
    cached = f"image_cache={tmp_path / 'decoded'}"
    assert fastmat("eval", *words, "engine={micro_batch: 3}", cached, "--out", other)[0] == 0
    assert len(calls) == 2 + 1  # of a batch of 4 and one of 2
    assert len(list((tmp_path / "decoded").iterdir())) == 1
    inputs = [row.inputs for row in read_results(plain).rows]
    assert [row.inputs for row in read_results(other).rows] == inputs
    assert fastmat("eval", *words, "engine={precision: bf16}", "--out", other, "--resume")[0] == 0
    found = [row.inputs for row in read_results(other).rows]
    assert found[0] == inputs[0] and found[1] != inputs[1]
    code, _, error = fastmat("attack", *settings, *ATTACK, "engine.precision=fp8", "--out", tmp_path / "none")
    assert code == 2
    assert "engine" in error and error.count("\n") == 1


def count_calls(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, dies: tuple[int, type[BaseException]] | None = None
) -> list[None]:
    """Grows with every call of a function; dies: in which call it raises what."""
    original: Callable[..., object] = getattr(owner, name)
    calls: list[None] = []

    def counting(*values: object, **named: object) -> object:
        calls.append(None)
        if dies and len(calls) == dies[0]:
            raise dies[1]
        return original(*values, **named)

    monkeypatch.setattr(owner, name, counting)
    return calls


def test_a_resumed_eval_shows_the_images_it_began_with(fastmat: Fastmat, settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "eval"
    words = [*settings, *EVAL, "attacks.pgd={name: pgd, steps: 1}", "threat.eps=8/255", "--out", out]
    assert fastmat("eval", *words)[0] == 0
    shown = [example.image for example in read_examples(out / "examples.json").examples]
    ids = tuple(f"images/{i}.png" for i in range(6))
    again = Showcase(out, attack="pgd", count=2, seed=99, ids=ids)
    assert [ids[i] for i in again.images] == shown and len(set(shown)) == 2
