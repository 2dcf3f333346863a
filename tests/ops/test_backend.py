"""The choice of implementation: argument, environment, reason."""

import logging
import subprocess
import sys

import pytest
import torch

from fastmat.ops import backend as module
from fastmat.ops import pgd_step, uniform_noise
from fastmat.ops.backend import uses_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh_choices():
    module._choose.cache_clear()
    yield
    module._choose.cache_clear()


def test_auto_is_the_reference_on_a_cpu_and_the_kernel_on_cuda() -> None:
    pytest.importorskip("triton")
    assert not uses_triton(None, CPU) and not uses_triton("auto", CPU)
    assert uses_triton("auto", CUDA) and not uses_triton("reference", CUDA)


def test_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMAT_BACKEND", "reference")
    assert not uses_triton(None, CUDA) and not uses_triton("", CUDA)
    assert uses_triton("auto", CUDA)


@pytest.mark.parametrize("interpreter", ["0", "1"])
def test_the_choice_and_its_reason_are_logged_once(
    interpreter: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)  # no reason for the default either way
    with caplog.at_level(logging.INFO, "fastmat.ops"):
        for _ in range(3):
            uniform_noise(0, torch.arange(2), (3,))
            uniform_noise(0, torch.arange(2), (3,), backend="reference")
    assert [record.getMessage() for record in caplog.records] == [
        "fastmat.ops runs the PyTorch reference: the default is 'auto', tensors are on cpu",
        "fastmat.ops runs the PyTorch reference: the argument backend is 'reference'",
    ]


def test_without_triton_auto_falls_back_and_says_so(monkeypatch, caplog) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, "fastmat.ops"):
        assert not uses_triton("auto", CUDA)
    assert caplog.messages == [
        "fastmat.ops runs the PyTorch reference: the argument backend is 'auto', tensors are on cuda, "
        "but triton is not installed"
    ]
    with pytest.raises(ValueError, match="the argument backend asks for Triton kernels, but triton is not installed"):
        uses_triton("triton", CUDA)


@pytest.mark.parametrize("interpreter", [None, "0"])
def test_triton_on_a_cpu_needs_the_interpreter(interpreter: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if interpreter is not None:
        monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="asks for Triton kernels, but tensors are on cpu"):
        pgd_step(x, x, x, eps=0.1, step_size=0.1, backend="triton")


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the argument backend names no backend: 'tritn'; did you mean 'triton'"):
        uses_triton("tritn", CPU)
    monkeypatch.setenv("FASTMAT_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"\$FASTMAT_BACKEND names no backend: 'gpu'"):
        uses_triton(None, CPU)


def test_importing_the_operators_does_not_import_triton() -> None:
    code = "import sys, torch; a = 'triton' in sys.modules; import fastmat.ops; print(a, 'triton' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert shown[0] == shown[1]
