"""Rows are written whole, read back as they were, and are all that tables and plots look at."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fastmat.benchmarks.plot import write_plots
from fastmat.benchmarks.rows import Row, append_rows, read_rows
from fastmat.benchmarks.suite import BENCHES, cases_of, commit_of
from fastmat.benchmarks.table import for_terminal, newest_runs, page
from fastmat.benchmarks.targets import TARGETS, Target
from fastmat.errors import UserError

ROW = Row(
    time="2026-01-01T00:00:00+00:00",
    operator="pgd_step",
    case="linf B=128 224px",
    shape={"images": 128, "side": 224},
    dtype="float32",
    implementation="fastmat",
    kind="fastmat",
    rounds=9,
    p20=9.0,
    p50=10.0,
    p80=12,
    error=0.0,
    tolerance=1e-6,
    repeatable=None,
    peak=None,
    moved=320_000_000,
    device="cpu",
    machine="A CPU",
    threads=1,
    versions={"torch": "2.15.0", "fastmat": "0.1.0"},
    commit="abc1234",
    command="fastmat bench ops --device cpu",
)


def row(**changes: object) -> Row:
    return dataclasses.replace(ROW, **changes)


OTHER = row(implementation="torchattacks", kind="published", p50=35.0, moved=None)


def test_rows_come_back_and_only_grow(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    append_rows(path, [ROW, OTHER])
    append_rows(path, [row(peak=12, commit=None, repeatable=True)])
    assert read_rows(path) == [ROW, OTHER, row(peak=12, commit=None, repeatable=True)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p50": "fast"}, "line 2: p50 cannot be 'fast'"),
        ({"rounds": True}, "line 2: rounds cannot be True"),
        ({"commit": 7}, "line 2: commit cannot be 7"),
        ({"versions": ["torch"]}, "line 2: versions cannot be"),
        ({"shape": {"images": None}}, "line 2: shape cannot be"),
        ({"extra": 1}, "line 2 is no row of a benchmark: extra"),
    ],
)
def test_malformed_rows_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [ROW])
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(ROW) | changes) + "\n")
    with pytest.raises(UserError, match=message):
        read_rows(path)


@pytest.mark.parametrize("line", [b"{", b"[]", b"7", b"{}", b"", b"\xff\xfe"])
def test_lines_that_are_no_rows(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(line + b"\n")
    with pytest.raises(UserError, match="line 1"):
        read_rows(tmp_path / "rows.jsonl")


def test_the_newest_run_of_a_case_counts() -> None:
    later = "2026-02-01T00:00:00+00:00"
    runs = newest_runs([ROW, OTHER, row(time=later, p50=5.0), row(case="other"), row(machine="B CPU"), row(threads=2)])
    assert [[one.p50 for one in run] for run in runs] == [[5.0], [10.0], [10.0], [10.0]], (
        "two threads are another place"
    )


def test_ratios_are_taken_within_a_run() -> None:
    text = for_terminal(newest_runs([ROW, OTHER]))
    assert "3.50x" in text
    assert "at least 3 times the speed of torchattacks  3.50      yes" in text
    assert "32.0 " in text  # GB/s
    assert text.splitlines()[1].endswith(" 0"), "an exact result"


def test_the_page_says_a_dash_where_nothing_was_measured() -> None:
    text = page([ROW, OTHER], ["speed-cpu.svg"])
    assert (
        "| cpu, 1 thread | pgd_step linf B=128 224px | at least 3 times the speed of torchattacks | 3.50 | yes |"
        in text
    )
    assert "| cuda | pgd_step linf B=128 224px | at least 4 times the speed of torchattacks | - | - |" in text
    assert "`fastmat bench ops --device cpu`" in text
    assert "speed-cpu.svg" in text
    assert page([], []).count("| - | - |") == len(TARGETS)


@pytest.mark.parametrize(
    ("quantity", "bound", "rows", "figure", "met"),
    [
        ("speed-up", 3, [ROW, OTHER], 3.5, True),
        ("speed-up", 3, [ROW], None, None),
        ("time", 1.2, [ROW, row(implementation="torchattacks", kind="published", p50=8.0)], 1.25, False),
        ("memory", 10, [row(peak=10), row(implementation="torchattacks", peak=120)], 12, True),
        ("memory", 10, [row(peak=10), row(implementation="torchattacks")], None, None),
        ("bandwidth", 85, [ROW, row(implementation="torchattacks", moved=160_000_000, p50=4.0)], 80, False),
    ],
)
def test_figures_of_targets(
    quantity: str, bound: float, rows: list[Row], figure: float | None, met: bool | None
) -> None:
    target = Target(
        device="cpu", operator="o", case="c", quantity=quantity, bound=bound, opponents=("torchattacks", "absent")
    )
    found = target.measured(rows)
    assert found == pytest.approx(figure)
    assert met is None or target.met(found) is met


def test_a_peak_needs_no_opponent() -> None:
    target = Target(device="cuda", operator="o", case="c", quantity="peak", bound=0.3)
    assert target.measured([row(peak=270_000_000)]) == pytest.approx(0.27)
    assert target.measured([ROW]) is None


def test_targets_name_implementations_and_cases_that_exist() -> None:
    cpu = torch.device("cpu")
    titles = {case.title for bench in BENCHES for case in cases_of(bench, cpu, short=False)}
    tiny = [case for bench in BENCHES for case in cases_of(bench, cpu, short=True)]
    names = {one.name for case in tiny for one in case.build().implementations}
    for target in TARGETS:
        assert target.device == "cuda" or f"{target.operator} {target.case}" in titles
        assert set(target.opponents) <= names | {"memeff", "inf_cl"}


def test_plots_come_from_rows_alone(tmp_path: Path) -> None:
    sizes = [
        row(
            operator="contrastive_loss", case=f"N={n}", shape={"rows": n}, implementation=name, kind=kind, peak=n * 1000
        )
        for n in (1024, 4096)
        for name, kind in (("fastmat", "fastmat"), ("open_clip ClipLoss", "published"))
    ]
    assert write_plots(tmp_path, []) == []
    assert write_plots(tmp_path, [ROW, OTHER, *sizes, row(device="cuda", machine="A GPU"), row(device="cuda")]) == [
        "speed-cpu-1-thread.svg",
        "speed-cuda.svg",
    ]
    first = (tmp_path / "speed-cpu-1-thread.svg").read_bytes()
    write_plots(tmp_path, [ROW, OTHER, *sizes])
    assert (tmp_path / "speed-cpu-1-thread.svg").read_bytes() == first


def test_no_commit_outside_a_checkout(tmp_path: Path) -> None:
    assert commit_of(tmp_path / "benchmarks") is None
