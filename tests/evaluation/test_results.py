import json
import os
import platform
from pathlib import Path

import pytest

from fastmat.errors import UserError
from fastmat.evaluation import results as module
from fastmat.evaluation.results import Results, Row, Threat, environment, read_results, write_atomic, write_results

RECALLS = {f"{way}@{k}": value for way in ("tr", "ir") for k, value in ((1, 10.0), (5, 20.5), (10, 100.0))}
ROW = {
    "surrogate": "a",
    "victim": "b",
    "white_box": False,
    "defence": "mat",
    "attack": "sga",
    "threat": {"eps": 2 / 255, "norm": "linf", "max_words": 1, "budgeted": True},
    "dataset": "flickr8k",
    "split": "test",
    "seed": 0,
    "scoring": "itc",
    "n_images": 3,
    "n_captions": 15,
    "gallery_images": 1000,
    **RECALLS,
    **{f"asr_{name}": value for name, value in RECALLS.items()},
    "ci": {"tr@1": [8.0, 12.5]},
    "max_distance": 2 / 255,
    "max_words_changed": 1,
    "seconds": 3.5,
    "pairs_per_s": 4.3,
    "inputs": "0" * 64,
}
FILE = {"rows": [ROW], "config": {"seed": 0}, "environment": {"python": "3.11"}}


def test_file_has_the_documented_keys(tmp_path: Path) -> None:
    write_results(tmp_path, Results.model_validate(FILE))
    assert json.loads((tmp_path / "results.json").read_text()) == {**FILE, "training": {}}
    assert read_results(tmp_path) == read_results(tmp_path / "results.json") == Results.model_validate(FILE)
    for key in ROW:
        assert "@" in key or key in str(module.__doc__), key


def test_results_from_before_these_keys_existed_are_read(tmp_path: Path) -> None:
    old = {key: value for key, value in ROW.items() if key not in ("white_box", "gallery_images", "inputs")}
    (tmp_path / "results.json").write_text(json.dumps({**FILE, "rows": [old, {**old, "victim": "a"}]}))
    rows = read_results(tmp_path).rows
    assert [row.white_box for row in rows] == [False, True]
    assert all(row.gallery_images is row.inputs is None for row in rows)


def test_committed_results_are_read() -> None:
    files = sorted((Path(__file__).parents[2] / "benchmarks/results/flickr8k").glob("*.json"))
    assert files
    for file in files:
        assert read_results(file).rows


def test_values_by_name() -> None:
    row = Row.model_validate(ROW)
    assert (row.value("tr@5"), row.value("asr_ir@10"), row.tr_10) == (20.5, 100.0, 100.0)
    assert Row.model_validate({**ROW, "asr_tr@1": None, "seconds": None, "pairs_per_s": None}).value("asr_tr@1") is None
    assert Row.model_validate({**ROW, "threat": {}}).threat == Threat(eps=0, norm="linf", max_words=0)


def test_figures_under_other_truths() -> None:
    figures = {
        "n_images": 2,
        "n_captions": 3,
        "right_captions": 4.5,
        "right_images": None,
        "metrics": {"tr_map@r": 50.0, "asr_tr@1": None},
        "ci": {"tr_map@r": [40.0, 60.0]},
    }
    row = Row.model_validate({**ROW, "truths": {"eccv": figures, "eccv/pairs": {**figures, "n_images": 1}}})
    assert [(label, wide.n_images, pairs.n_images) for label, wide, pairs in row.judged()] == [("eccv", 2, 1)]
    written = json.loads(Results(rows=[row], config={}, environment={}).model_dump_json(by_alias=True))["rows"][0]
    assert written["truths"]["eccv"] == figures and Row.model_validate(written) == row
    assert "truths" not in Row.model_validate(ROW).model_dump() and "truths" in str(module.__doc__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"truths": {"t": {**dict.fromkeys(("n_images", "n_captions"), 1), "right_captions": 1, "right_images": 1}}},
            r"key rows\.0\.truths\.t\.metrics: ",
        ),
        ({"tr@1": 130}, r"results\.json: key rows\.0\.tr@1: .*less than or equal to 100"),
        ({"tr@1": None}, r"key rows\.0\.tr@1: "),
        ({"recall": 1}, r"key rows\.0\.recall: "),
        ({"ci": {"tr@1": [1]}}, r"key rows\.0\.ci\.tr@1\.1: "),
        ({"threat": {"eps": -1}}, r"key rows\.0\.threat\.eps: "),
    ],
)
def test_reading_names_the_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    (tmp_path / "results.json").write_text(json.dumps({**FILE, "rows": [{**ROW, **change}]}))
    with pytest.raises(UserError, match=message):
        read_results(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]"])
def test_reading_what_is_no_results_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UserError, match=r"results\.json: "):
        read_results(tmp_path)
    with pytest.raises(UserError, match=r"nowhere: no such file"):
        read_results(tmp_path / "nowhere")


def test_writing_replaces_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    assert write_atomic(path, b"old") == path
    for step in ("replace", "fsync"):

        def fails(*_: object) -> None:
            raise OSError("disk full")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(os, step, fails)
            write_atomic(path, b"new")
        assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_environment_tells_versions_and_no_names() -> None:
    found = environment("cpu")
    assert set(found) == {"python", "torch", "fastmat", "device", "cpu_count", "platform"}
    assert found["device"] == "cpu" and platform.node() not in json.dumps(found) and "/" not in found["platform"]
