"""Examples in docstrings run."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).parent.parent / "fastmat"
MODULES = sorted(
    ".".join(path.relative_to(SOURCES.parent).with_suffix("").parts)
    for path in SOURCES.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    result = doctest.testmod(import_module(name), extraglobs={"torch": torch})
    assert result.attempted and not result.failed
