"""`pytest benchmarks`: every implementation of every case as a pytest-benchmark; tiny shapes, unless with --full."""

from collections.abc import Callable

import pytest
import torch

from fastmat.benchmarks.harness import Case, Tensors


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the shapes of `fastmat bench ops` instead of tiny ones")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Only tiny cases are built here; a full one is offered all names of its operator's, and skips those it lacks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = metafunc.module.cases(device, True)
    full = metafunc.module.cases(device, False) if metafunc.config.getoption("--full") else tiny

    def names(case: Case) -> list[str]:
        known = [case] if full is tiny else [other for other in tiny if other.operator == case.operator]
        return list(dict.fromkeys(one.name for other in known for one in other.build().implementations))

    chosen = [(case, name) for case in full for name in names(case)]
    metafunc.parametrize("micro", chosen, ids=[f"{case.title}, {name}" for case, name in chosen], indirect=True)


@pytest.fixture
def micro(request: pytest.FixtureRequest) -> Callable[[], Tensors]:
    case, name = request.param
    return next((one.call for one in case.build().implementations if one.name == name), None) or pytest.skip("not here")
