"""The gate stands before every figure; timing takes turns."""

import doctest
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from fastmat.benchmarks import bench_start, harness, passes, suite, table
from fastmat.benchmarks.harness import Case, Implementation, QualityError, Work, can_compile, largest_error, measure
from fastmat.benchmarks.memory import peak_in_child, peak_memory

CPU = torch.device("cpu")
EXACT = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


def implementation(name: str, add: float = 0.0, kind: str = "published") -> Implementation:
    return Implementation(name=name, kind=kind, call=lambda: ((EXACT + add).float(),))


def case(*implementations: Implementation, **options: bool) -> Case:
    work = Work(lambda: (EXACT,), list(implementations))
    return Case(operator="op", name="n", shape={}, dtype="float32", tolerance=1e-3, build=lambda: work, **options)


def run(chosen: Case, child: Callable[[str], int | None] = lambda name: None) -> list:
    return measure(chosen, CPU, seconds=0.0, min_rounds=4, child=child)


def test_a_wrong_implementation_stops_its_case() -> None:
    with pytest.raises(QualityError, match=r"op n: wrong is off by 1\.0e-02, more than 1e-03; nothing of this case"):
        run(case(implementation("right"), implementation("wrong", 0.04)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_passes_with_a_nan(value: float) -> None:
    with pytest.raises(QualityError):
        run(case(implementation("wrong", value)))


def test_a_wrong_shape_is_wrong() -> None:
    with pytest.raises(QualityError, match="shape"):
        largest_error([torch.ones(3, 1)], [torch.ones(3)])


def test_every_round_runs_everybody_in_rotating_order() -> None:
    order: list[str] = []

    def counted(name: str) -> Implementation:
        return Implementation(name=name, kind="tuned", call=lambda: (order.append(name), EXACT)[1:])

    measured = run(case(counted("a"), counted("b"), counted("c")))
    assert "".join(order[6:]) == "abcbcacababc"  # after gate and warm-up
    assert [len(one.times) for one in measured] == [4, 4, 4]
    assert all(one.error == 0 for one in measured)


def test_a_limit_needs_no_result_and_the_check_stands_for_the_call() -> None:
    limit = Implementation(name="copy", kind="limit", call=lambda: (EXACT * 7,), moved=8)
    random = Implementation(name="random", kind="published", call=lambda: (torch.rand(3),), check=lambda: (EXACT,))
    measured = run(case(limit, random))
    assert [one.error for one in measured] == [None, 0]


def test_two_calls_must_agree_where_that_is_asked() -> None:
    steps = iter(range(9))
    drifting = Implementation(name="drifting", kind="fastmat", call=lambda: (EXACT + 1e-5 * next(steps),))
    with pytest.raises(QualityError, match="two calls of drifting differ"):
        run(case(drifting, repeatable=True))
    assert run(case(implementation("steady"), repeatable=True))[0].repeatable is True


def test_a_package_that_fails_is_left_out_but_our_failures_are_not() -> None:
    def broken() -> tuple[torch.Tensor, ...]:
        raise RuntimeError("no kernel image\nfor this device")

    fused = Implementation(name="foreign", kind="fused", call=broken)
    with pytest.warns(UserWarning, match="op n: foreign left out: no kernel image$"):
        assert [one.implementation.name for one in run(case(implementation("a"), fused))] == ["a"]
    with pytest.raises(RuntimeError):
        run(case(Implementation(name="ours", kind="fastmat", call=broken)))


def test_peak_memory_sees_what_a_call_holds_at_once() -> None:
    kept = torch.ones(1 << 20)
    peak = peak_memory(lambda: torch.ones(1 << 24) + 1, CPU)
    if peak is None:
        pytest.skip("the system does not say")
    assert kept.sum() == 1 << 20
    assert 1.95 * 2**26 < peak < 2.2 * 2**26


def test_peak_memory_in_a_child() -> None:
    peak = peak_in_child("cosine", "cosine_to_set B=3 T=15", "fastmat", short=True)
    assert peak is None or 0 <= peak < 2**24


@pytest.mark.parametrize("module", [bench_start, harness, passes, table])
def test_examples_in_docstrings_run(module: ModuleType) -> None:
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("bench", suite.BENCHES)
def test_every_case_has_ours_a_published_and_a_tuned_opponent(bench: str) -> None:
    for one in suite.cases_of(bench, CPU, short=False):
        tiny = next(short for short in suite.cases_of(bench, CPU, short=True) if short.operator == one.operator)
        kinds = [each.kind for each in tiny.build().implementations]
        assert kinds.count("fastmat") == 1
        assert "published" in kinds
        # Where eager PyTorch has nothing better, the tuned opponent is the compiled one, which tiny shapes leave out.
        assert "tuned" in kinds or (bench == "pgd" and can_compile(CPU))
