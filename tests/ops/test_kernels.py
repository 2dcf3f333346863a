"""What holds for every kernel: it compiles for an H200, and every line of every launcher runs."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType, FunctionType

import pytest
import torch
from launches import CALLS

pytest.importorskip("triton")
HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the calls are made on CPU tensors, through the interpreter"
)
MODULES = sorted(path.stem for path in KERNELS.glob("*.py") if path.stem != "__init__")


def kernels_in(module: str) -> set[str]:
    """The names of the functions that are launched: `..._kernel`, under @triton.jit."""
    tree = ast.parse((KERNELS / f"{module}.py").read_text())
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.decorator_list and node.name.endswith("_kernel")
    }


def test_every_kernel_compiles_for_an_h200() -> None:
    """Ahead of time, for sm_90, with every combination of types and branches that the operators launch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, HERE.parent / "launches.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shared = {name: int(most) for name, most in map(str.split, done.stdout.splitlines())}
    assert set(shared) == set().union(*map(kernels_in, MODULES))
    assert max(shared.values()) <= 227 * 1024, "more shared memory than a block of an H200 may have"


@interpreted
def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which need not be theirs."""
    from triton.runtime.interpreter import GridExecutor

    launch, chosen, launched = GridExecutor.__call__, [], set()

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        chosen.append(tensor.device)
        yield
        chosen.pop()

    def spy(self: GridExecutor, *arguments: object, **named: object) -> None:
        assert chosen, f"{self.fn.__name__} is launched wherever the caller happens to be"
        launched.add(self.fn.__name__)
        launch(self, *arguments, **named)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", spy)
    for calls in CALLS.values():
        for call in calls():
            call()
    assert launched == set().union(*map(kernels_in, MODULES))


@interpreted
def test_every_line_of_every_launcher_runs() -> None:
    launchers = {
        function.__code__: f"{module}.{name}"
        for module in MODULES
        for name, function in inspect.getmembers(importlib.import_module(f"fastmat.kernels.{module}"))
        if isinstance(function, FunctionType) and name.startswith("launch_")
    }
    reached: dict[CodeType, set[int]] = {code: set() for code in launchers}

    def trace(frame: FrameType, event: str, argument: object):
        if frame.f_code not in reached:
            return None
        reached[frame.f_code].add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for calls in CALLS.values():
            for call in calls():
                call()
    finally:
        sys.settrace(before)
    for code, name in launchers.items():
        lines = {line for _, _, line in code.co_lines() if line is not None} - {code.co_firstlineno}
        assert lines <= reached[code], f"{name}: lines {sorted(lines - reached[code])} never ran"
