"""`candidates` fills a folder; attacks, evaluations and trainings with the same settings then compute nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_mlm import tiny_parts

from fastmat.evaluation.results import read_results
from fastmat.text import candidate_cache, masked

Fastmat = Callable[..., tuple[int, str, str]]
SGA = "{name: sga, steps: 1, scales: [0.5]}"
OFFICIAL = "{name: co_attack, steps: 1, parity: official}"


def texts_of(folder: Path) -> bytes:
    return (folder / "texts.jsonl").read_bytes()


def for_candidates(settings: list[str]) -> list[str]:
    return [word for word in settings if not word.startswith("batch_size")]


@pytest.mark.parametrize(
    ("attack", "same"),
    [
        (SGA, []),
        (OFFICIAL, ["parity=official", "quirks.text_max_length=30"]),
        ("{name: bert_attack, candidates: {name: masked, top_k: 5}}", ["candidates={name: masked, top_k: 5}"]),
    ],
)
def test_an_attack_finds_what_was_filled_with_its_settings(
    fastmat: Fastmat, settings: list[str], tmp_path: Path, attack: str, same: list[str]
) -> None:
    folder, words = tmp_path / "filled", for_candidates(settings)
    code, shown, error = fastmat("candidates", *words, *same, "--out", folder)
    assert code == 0, error
    assert shown == f"candidates: 0 captions found, 12 computed\n{folder}\n"
    assert fastmat("candidates", *words, *same, f"candidate_cache={folder}")[1] == (
        f"candidates: 12 captions found, 0 computed\n{folder}\n"
    )

    run = [*settings, "model=tiny", f"attack={attack}"]
    assert "candidates:" not in fastmat("attack", *run, "--out", tmp_path / "without")[1]
    code, shown, error = fastmat("attack", *run, f"candidate_cache={folder}", "--out", tmp_path / "with")
    assert code == 0, error
    assert "candidates: 12 captions found, 0 computed\n" in shown
    assert texts_of(tmp_path / "with") == texts_of(tmp_path / "without")
    of_other = fastmat("attack", *run, "attack=bert_attack", "attack.candidates={name: masked, top_k: 3}",
                       f"candidate_cache={folder}", "--out", tmp_path / "other")[1]  # fmt: skip
    assert "candidates: 0 captions found, 12 computed\n" in of_other


def test_the_folder_is_no_input_of_a_result(fastmat: Fastmat, settings: list[str], tmp_path: Path) -> None:
    out, cached = tmp_path / "eval", f"candidate_cache={tmp_path / 'filled'}"
    words = [*settings, "victims.plain.model=tiny", f"attacks={{sga: {SGA}, bert: bert_attack}}", "resamples=10"]
    assert fastmat("eval", *words, "--out", out)[0] == 0
    first = [row.inputs for row in read_results(out).rows]
    code, shown, _ = fastmat("eval", *words, cached, "--out", out, "--resume")
    assert code == 0
    assert "inputs unchanged: 3 of 3 rows kept" in shown
    assert "candidates:" not in shown  # nothing was asked for
    code, shown, _ = fastmat("eval", *words, cached, "--out", tmp_path / "other")
    assert [row.inputs for row in read_results(tmp_path / "other").rows] == first
    assert "candidates: 12 captions found, 12 computed\n" in shown  # two attacks share them


def test_training_reads_the_folder_and_goes_on_with_another(
    fastmat: Fastmat, settings: list[str], tmp_path: Path
) -> None:
    words = [*settings, "model=tiny", "defence={name: mat, steps: 1}", "train={steps: 4}", "captions_per_image=2"]
    words += ["batch_size=6", "threat.max_words=1"]
    assert fastmat("candidates", *for_candidates(settings), "--out", tmp_path / "filled")[0] == 0
    code, shown, error = fastmat("train", *words, f"candidate_cache={tmp_path / 'filled'}", "--out", tmp_path / "run")
    assert code == 0, error
    assert "candidates: 48 captions found, 0 computed\n" in shown


def test_a_killed_fill_goes_on(
    fastmat: Fastmat, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmat.cli.candidates.CAPTIONS_PER_WRITE", 5)
    original, calls = candidate_cache.find_candidates, 0

    def dies(*values: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*values, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(candidate_cache, "find_candidates", dies)
    words = [*for_candidates(settings), "--out", tmp_path / "filled"]
    code, _, error = fastmat("candidates", *words)
    assert code == 130
    assert f"10 of 12 captions are in {tmp_path / 'filled'}; repeat to go on" in error
    assert "candidates: 10 captions found, 2 computed\n" in fastmat("candidates", *words)[1]


def test_another_language_model_computes_its_own_and_never_reads_foreign_ones(
    fastmat: Fastmat, settings: list[str], tmp_path: Path
) -> None:
    """Each model has its place below the folder; a file that was put into the wrong place is known by its hash."""
    folder, words = tmp_path / "filled", for_candidates(settings)
    model, tokenizer = tiny_parts(seed=1)
    model.save_pretrained(tmp_path / "mlm")
    tokenizer.save_pretrained(tmp_path / "mlm")
    other = f"mlm={tmp_path / 'mlm'}"
    assert fastmat("candidates", *words, "--out", folder)[0] == 0
    (mine,) = folder.glob("*/*.jsonl")
    assert "0 captions found, 12 computed" in fastmat("candidates", *words, other, "--out", folder)[1]
    (foreign,) = (place for place in folder.iterdir() if place != mine.parent)
    (foreign / "copied.jsonl").write_bytes(mine.read_bytes())
    for file in foreign.glob("[0-9]*.jsonl"):
        file.unlink()
    run = [*settings, other, "model=tiny", f"attack={SGA}", f"candidate_cache={folder}", "--out", tmp_path / "set"]
    code, _, error = fastmat("attack", *run)
    assert (code, error) == (
        2,
        f"fastmat: {foreign / 'copied.jsonl'} holds candidates of another masked language model: move it away\n",
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["mlm=null"], "set mlm to a transformers BertForMaskedLM"),
        (["candidates={name: masked, top_k: 0}"], "candidates: top_k must be at least 1, got 0"),
        (["candidates={name: masked, topk: 5}"], "command line: candidates: unknown key 'topk'; did you mean 'top_k'?"),
        (["candidates=maskd"], "command line: candidates: unknown name 'maskd'; did you mean 'masked'?"),
        (["parity=published"], "command line: parity: input should be 'correct' or 'official', got 'published'"),
        (["quirks.append_sepp=true"], "quirks: unknown key 'append_sepp'; did you mean 'append_sep'?"),
        (["limit=7"], "limit: six/test has 6 images, cannot take 7"),
        (["device=gpu"], "device: 'gpu' is no device of fastmat"),
        (["attack=sga"], "unknown key 'attack'"),
    ],
)
def test_bad_input(fastmat: Fastmat, settings: list[str], tmp_path: Path, words: list[str], sentence: str) -> None:
    code, _, error = fastmat("candidates", *for_candidates(settings), *words, "--out", tmp_path / "filled")
    assert (code, error.count("\n")) == (2, 1)
    assert sentence in error
    assert not (tmp_path / "filled").exists()


def test_a_folder_must_be_named_and_be_one(fastmat: Fastmat, settings: list[str], tmp_path: Path) -> None:
    words = for_candidates(settings)
    assert fastmat("candidates", *words)[2] == "fastmat: no folder is named to keep candidates in: add --out DIR\n"
    (tmp_path / "file").write_text(json.dumps("mine"))
    assert "is a file: give a directory" in fastmat("candidates", *words, "--out", tmp_path / "file")[2]
    assert masked.CAPTIONS_PER_WRITE == candidate_cache.CAPTIONS_PER_WRITE
