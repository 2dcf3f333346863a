"""`fastmat bench`: rows before anything else, one sentence per mistake."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastmat.benchmarks import suite
from fastmat.benchmarks.attacks import suite as attacks_suite
from fastmat.benchmarks.attacks.rows import AttackRow
from fastmat.benchmarks.harness import Case, Implementation, QualityError, Work
from fastmat.benchmarks.rows import read_rows, read_rows_of

Fastmat = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """What every bench holds, instead of the real cases."""
    found: list[Case] = []
    monkeypatch.setattr(suite, "cases_of", lambda *_, **__: found)
    return found


def case(name: str, **calls: Callable[[], tuple[torch.Tensor, ...]]) -> Case:
    exact = torch.ones(2)
    made = [
        Implementation(name=who, kind="fastmat" if who == "fastmat" else "published", call=call)
        for who, call in calls.items()
    ]
    work = Work(lambda: (exact,), made)
    return Case(operator="op", name=name, shape={"n": 2}, dtype="float32", tolerance=1e-3, build=lambda: work)


def right() -> tuple[torch.Tensor, ...]:
    return (torch.ones(2),)


def test_a_short_run_of_one_bench_twice(fastmat: Fastmat, tmp_path: Path) -> None:
    words = ("bench", "ops", "--short", "--device", "cpu", "--only", "pgd", "--out", tmp_path)
    code, out, error = fastmat(*words)
    assert code == 0
    assert "momentum_step mi B=2 8px" in out
    assert "torchattacks" in out
    rows = read_rows(tmp_path / "rows.jsonl")
    assert {row.operator for row in rows} == {"pgd_step", "momentum_step", "apgd_step"}
    assert {row.command for row in rows} == {"fastmat bench ops --device cpu --only pgd --threads 1 --short"}
    assert {row.threads for row in rows} == {1}
    assert all(row.error is None or row.error <= row.tolerance for row in rows)
    assert str(tmp_path) not in (tmp_path / "rows.jsonl").read_text()
    assert "measuring pgd_step linf B=2 8px" in error
    assert fastmat(*words)[0] == 0
    assert len(read_rows(tmp_path / "rows.jsonl")) == 2 * len(rows)
    names = {"README.md", "rows.jsonl", "speed-cpu-1-thread.svg"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["opps"], "fastmat: no suite 'opps'; did you mean 'ops'?"),
        (["ops", "--only", "pdg"], "fastmat: --only: no bench 'pdg'; did you mean 'pgd'?"),
        (["ops", "--threads", "0"], "fastmat: --threads must be at least 1, got 0"),
        (["ops", "--device", "tpu"], "fastmat: device: 'tpu' is no device of fastmat"),
        (["ops", "--device", "cuda:99"], "fastmat: device: 'cuda:99' is not here"),
        (["ops", "--out", "file"], "fastmat: --out file is a file; name a folder"),
        (["ops", "--out", "damaged"], "fastmat: damaged/rows.jsonl, line 1 is not JSON"),
        (["attacks", "--only", "sgaa"], "fastmat: --only: no bench 'sgaa'; did you mean 'sga'?"),
        (["attacks", "--images", "1"], "fastmat: --images must be at least 2, got 1"),
        (["attacks", "--peer", "file"], "fastmat: --peer file is no folder"),
        (["attacks", "--peer-python", "python"], "fastmat: --peer-python needs --peer"),
        (["train", "--only", "matt"], "fastmat: --only: no bench 'matt'; did you mean 'mat'?"),
        (["train", "--peer", "folder"], "fastmat: --peer belongs to `fastmat bench attacks`"),
        (["attacks", "--out", "damaged"], "fastmat: damaged/rows.jsonl, line 1 is not JSON"),
        (
            ["ops", "--model", "ViT-B-16"],
            "fastmat: --model belongs to `fastmat bench attacks` and `fastmat bench train`",
        ),
        ([], "fastmat: the following arguments are required: WHAT"),
    ],
)
def test_mistakes_are_one_sentence(
    fastmat: Fastmat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/rows.jsonl").write_text("{\n")
    code, out, error = fastmat("bench", *words)
    assert (code, out) == (2, "")
    assert error.startswith(sentence)
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"file", "damaged"}


def test_a_refused_case_has_no_row_and_the_others_go_on(fastmat: Fastmat, tmp_path: Path, cases: list[Case]) -> None:
    cases += [case("wrong", fastmat=right, other=lambda: (torch.ones(2) + 0.01,)), case("right", fastmat=right)]
    code, out, error = fastmat("bench", "ops", "--short", "--device", "cpu", "--only", "pgd", "--out", tmp_path)
    assert code == 2
    assert [row.case for row in read_rows(tmp_path / "rows.jsonl")] == ["right"]
    assert "op right" in out
    assert error.splitlines()[-1].startswith("fastmat: 1 of the cases gave a wrong result and have no row: op wrong")


def test_a_short_run_of_one_attack(fastmat: Fastmat, tmp_path: Path) -> None:
    words = ("bench", "attacks", "--short", "--device", "cpu", "--only", "bert_attack", "--out", tmp_path)
    code, out, error = fastmat(*words)
    assert code == 0
    assert "measuring bert_attack (both)" in error
    assert "at least 8 times the speed of published" in out
    rows = read_rows_of(AttackRow, tmp_path / "rows.jsonl")
    assert [(row.kind, row.dtype) for row in rows][:2] == [("published", "float32"), ("fastmat", "float32")]
    assert [row.kind for row in rows].count("cold") == 2
    assert len(rows) == 7
    assert {row.command for row in rows} == {
        "fastmat bench attacks --device cpu --only bert_attack --threads 1 --short"
    }
    assert rows[1].quality["agreement"] == 1
    assert rows[1].counts["text_encodings"] < rows[0].counts["text_encodings"]
    assert rows[0].quality["words_tried"] >= 1
    names = {"README.md", "rows.jsonl", "speed-cpu-1-thread-built-in-at-32-px-2-images.svg"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_an_attack_that_fails_its_gate_has_no_row(
    fastmat: Fastmat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise QualityError("bert_attack (both), fastmat float32: 1 texts differ")

    monkeypatch.setattr(attacks_suite, "compare", refuse)
    words = ("bench", "attacks", "--short", "--device", "cpu", "--only", "bert_attack", "--out", tmp_path)
    code, out, error = fastmat(*words)
    assert (code, out) == (2, "")
    assert (tmp_path / "rows.jsonl").read_text() == ""
    assert error.splitlines()[-1] == (
        "fastmat: 1 of the cases gave a wrong result and have no row: "
        "bert_attack (both), fastmat float32: 1 texts differ"
    )


def test_a_bench_named_twice_runs_once(fastmat: Fastmat, tmp_path: Path, cases: list[Case]) -> None:
    cases.append(case("n", fastmat=right))
    words = ("bench", "ops", "--short", "--device", "cpu", "--out", tmp_path, "--only", "pgd", "pgd")
    assert fastmat(*words)[0] == 0
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert row.command == "fastmat bench ops --device cpu --only pgd --threads 1 --short"
    # A second run right away is another run: the table shows it alone.
    assert fastmat(*words)[1].count("op n") == 1
    assert (tmp_path / "README.md").read_text().count("| op n |") == 1


def test_a_folder_that_takes_no_files_is_found_before_anything_is_measured(
    fastmat: Fastmat, tmp_path: Path, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)  # the user of a container may write everywhere
    cases.append(case("n", fastmat=right))
    code, out, error = fastmat("bench", "ops", "--short", "--device", "cpu", "--only", "pgd", "--out", tmp_path)
    rows = tmp_path / "rows.jsonl"
    assert (code, out) == (2, "")
    assert error == f"fastmat: {rows}: Permission denied; check the path and its permissions\n"


def test_an_interrupt_keeps_what_was_measured(fastmat: Fastmat, tmp_path: Path, cases: list[Case]) -> None:
    def interrupt() -> tuple[torch.Tensor, ...]:
        raise KeyboardInterrupt

    cases += [case("done", fastmat=right), case("broken off", fastmat=interrupt)]
    code, out, error = fastmat("bench", "ops", "--short", "--device", "cpu", "--only", "pgd", "--out", tmp_path)
    assert code == 130
    assert [row.case for row in read_rows(tmp_path / "rows.jsonl")] == ["done"]
    assert "op done" in out
    assert (tmp_path / "README.md").is_file()
    assert f"interrupted; the cases measured so far are in {tmp_path / 'rows.jsonl'}" in error


def test_micro_benchmarks_are_collected() -> None:
    pytest.importorskip("pytest_benchmark")

    class Seen:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            self.names = [item.nodeid for item in session.items]

    seen = Seen()
    assert pytest.main([str(ROOT / "benchmarks"), "--collect-only", "-qq", "-p", "no:cacheprovider"], [seen]) == 0
    for name in suite.BENCHES:
        assert any(f"bench_{name}.py::test_{name}[" in each for each in seen.names)
    assert "benchmarks/bench_pgd.py::test_pgd[pgd_step linf B=2 8px, torchattacks]" in seen.names
