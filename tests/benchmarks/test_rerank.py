"""`fastmat bench rerank`: the published loop does the published work, and nothing is reported of other scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastmat.benchmarks.harness import QualityError, admit
from fastmat.benchmarks.rerank.contestants import FILLER, misplaced, ours, published, tuned
from fastmat.benchmarks.rerank.names import NAMES
from fastmat.benchmarks.rerank.setting import CAPTIONS, Setting, prepare
from fastmat.benchmarks.rerank.suite import PUBLISHED, TARGETS, cases
from fastmat.benchmarks.rows import read_rows
from fastmat.cli.main import main

CPU = torch.device("cpu")
N, K = 4, 3


def setting_of(name: str) -> Setting:
    return prepare(name, CPU, images=N, k=K, short=True)


def keys_computed(setting: Setting, call: Callable[[], object]) -> int:
    """How many images' keys the first layer's cross-attention makes."""
    counted: list[int] = []

    def count(module: nn.Module, arguments: tuple[Tensor]) -> None:
        counted.append(len(arguments[0]))

    key = setting.model.fusion.layers[0].crossattention.key  # type: ignore[union-attr]
    handle = key.register_forward_pre_hook(count)
    call()
    handle.remove()
    return sum(counted)


@pytest.mark.parametrize("name", NAMES)
def test_the_work_of_each(name: str) -> None:
    """Keys: for every candidate of every query; for every candidate of a text; for every image."""
    setting = setting_of(name)
    tokens, texts = setting.image.tokens, N * CAPTIONS
    assert tokens is not None
    assert keys_computed(setting, lambda: published(setting)) == (N + texts) * K
    assert keys_computed(setting, lambda: tuned(setting, tokens)) == N + texts * K
    assert keys_computed(setting, lambda: ours(setting)) == N


@pytest.mark.parametrize("name", NAMES)
def test_scores_depend_on_both_and_ranks_are_held(name: str) -> None:
    setting = setting_of(name)
    exact, got = published(setting), ours(setting)
    for scores, found in zip(exact, got, strict=True):
        assert scores[scores > FILLER].std() > 1e-3
        torch.testing.assert_close(found, scores, atol=1e-5, rtol=1e-5)
    assert misplaced(setting, got, exact, tolerance=1e-4) == 0
    turned = got[0].where(got[0] == FILLER, -got[0]), got[1]
    assert misplaced(setting, turned, exact, tolerance=1e-4) > 0


def test_the_gate_refuses_another_score() -> None:
    (case,) = cases("blip", CPU, short=True)
    work = case.build()
    expected = work.exact()
    assert [one.kind for one in work.implementations] == ["fastmat", "published", "tuned"]
    assert [admit(case, one, expected).implementation for one in work.implementations] == work.implementations
    with pytest.raises(QualityError, match="is off by"):
        admit(case, work.implementations[0], (expected[0] * 1.001, *expected[1:]))


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "rerank", "--short", "--device", "cpu", "--only", "albef", "--out", str(tmp_path)]
    assert main(words) == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [(row.operator, row.kind) for row in rows] == [("rerank", who) for who in ("fastmat", "published", "tuned")]
    assert PUBLISHED in capsys.readouterr().out
    assert "query by query" in (tmp_path / "README.md").read_text()


def test_targets_name_cases_that_are_measured() -> None:
    known = {case.name for name in NAMES for case in cases(name, CPU, short=False)}
    assert {target.case for target in TARGETS if target.device == "cpu"} == known
