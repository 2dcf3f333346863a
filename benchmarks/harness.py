"""Timing that holds on a shared machine: one process, opponents in turn, quantiles, and a gate before every figure."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastmat.benchmarks.memory import peak_memory

Kind = Literal["fastmat", "published", "tuned", "fused", "limit"]
Tensors = tuple[Tensor, ...]
FLUSH_BYTES = 256 << 20  # more than any L2 cache


class QualityError(RuntimeError):
    """An implementation does not compute what its case asks for; no figure of the case may be reported."""


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute a case.

    kind: "fastmat"; "published", as its authors wrote it; "tuned", the same mathematics in good PyTorch, or compiled;
        "fused", a package with its own kernels; "limit", a bound that computes something else, such as a copy.
    call: what is timed. check: what the gate compares, where `call` draws at random; None: `call`.
    moved: bytes that it must move, where bandwidth is the question.
    """

    name: str
    kind: Kind
    call: Callable[[], Tensors]
    check: Callable[[], Tensors] | None = None
    moved: int | None = None


class Work(NamedTuple):
    """Inputs in place: the exact result in a wider format, and who computes it."""

    exact: Callable[[], Tensors]
    implementations: list[Implementation]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table; nothing is allocated before `build`.

    tolerance: the largest |result - exact| / max |exact|, tensor by tensor, that passes the gate.
    memory: peaks are measured as well. repeatable: two calls of ours must agree bit by bit.
    """

    operator: str
    name: str
    shape: Mapping[str, int | float | str | bool]
    dtype: str
    tolerance: float
    build: Callable[[], Work]
    memory: bool = False
    repeatable: bool = False

    @property
    def title(self) -> str:
        return f"{self.operator} {self.name}"


@dataclass(kw_only=True)
class Measurement:
    """Of one implementation: milliseconds of every round, error at the gate, peak bytes above what stood before."""

    implementation: Implementation
    error: float | None = None
    repeatable: bool | None = None
    peak: int | None = None
    times: list[float] = field(default_factory=list)


def measure(
    case: Case, device: torch.device, *, seconds: float, min_rounds: int, child: Callable[[str], int | None]
) -> list[Measurement]:
    """Gate, memory, then rounds in which every implementation runs once, in rotating order, for about `seconds`.

    child: the peak of an implementation, by name, in a process of its own; used on the CPU.
    An opponent that this machine cannot run (a foreign package, or too little memory) is left out with a warning.
    Raises QualityError when a result is wrong.
    """
    exact, implementations = case.build()
    expected = exact()
    measured = []
    for implementation in implementations:
        try:
            measured.append(admit(case, implementation, expected))
        except QualityError:
            raise
        except Exception as error:
            if implementation.kind != "fused" and not isinstance(error, torch.OutOfMemoryError):
                raise
            warnings.warn(f"{case.title}: {implementation.name} left out: {str(error).splitlines()[0]}")
    del expected
    for one in measured:
        if case.memory and one.implementation.kind != "limit":
            call = one.implementation.call
            one.peak = peak_memory(call, device) if device.type == "cuda" else child(one.implementation.name)
    timer = Timer(device)
    for one in measured:
        one.implementation.call()  # the gate may have run something else
    begun = time.perf_counter()
    rounds = 0
    while rounds < min_rounds or (time.perf_counter() - begun < seconds and rounds < 1000):
        first = rounds % len(measured)
        for one in (*measured[first:], *measured[:first]):
            one.times.append(timer(one.implementation.call))
        rounds += 1
    return measured


def admit(case: Case, implementation: Implementation, expected: Sequence[Tensor]) -> Measurement:
    """The measurement of an implementation that passed the gate, still without times."""
    if implementation.kind == "limit":
        implementation.call()
        return Measurement(implementation=implementation)
    check = implementation.check or implementation.call
    got = tuple(tensor.clone() for tensor in check()) if case.repeatable else check()
    error = largest_error(got, expected)
    if not error <= case.tolerance:
        raise QualityError(
            f"{case.title}: {implementation.name} is off by {error:.1e}, "
            f"more than {case.tolerance:.0e}; nothing of this case is reported"
        )
    same = all(torch.equal(a, b) for a, b in zip(got, check(), strict=True)) if case.repeatable else None
    if same is False and implementation.kind == "fastmat":
        raise QualityError(f"{case.title}: two calls of {implementation.name} differ")
    return Measurement(implementation=implementation, error=error, repeatable=same)


def largest_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Over all tensors, the largest difference relative to the largest entry; NaN anywhere gives infinity.

    >>> largest_error([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 4.0])])
    0.5
    """
    worst = 0.0
    for result, exact in zip(got, expected, strict=True):
        if result.shape != exact.shape:
            raise QualityError(f"shape {tuple(result.shape)} where {tuple(exact.shape)} is asked for")
        exact = exact.double()
        scale = exact.abs().max().clamp_min(1e-30)
        error = ((result.double() - exact).abs().max() / scale).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


class Timer:
    """Milliseconds of one call. On a GPU between two events, with the L2 cache emptied before."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def __call__(self, call: Callable[[], object]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        self.flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` has what it needs: a C++ compiler, on the CPU."""
    return device.type == "cuda" or shutil.which("g++") is not None or shutil.which("clang++") is not None
