"""All cases of the chosen benches: measured, appended to rows.jsonl case by case, then drawn and tabled."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import import_module, metadata
from pathlib import Path

import numpy as np
import torch

from fastmat.benchmarks.harness import Case, Measurement, QualityError, measure
from fastmat.benchmarks.memory import peak_in_child
from fastmat.benchmarks.rows import Row, append_rows

# Each is fastmat/benchmarks/bench_NAME.py.
BENCHES = ("pgd", "start", "contrastive", "cosine", "ranks", "views")
LIBRARIES = ("torch", "triton", "torchvision", "open_clip_torch", "numpy", "memeff", "inf_cl")
HERE = Path(__file__).resolve().parent


def cases_of(bench: str, device: torch.device, *, short: bool) -> list[Case]:
    """The cases of a bench by its name; only its opponents are imported."""
    return import_module(f"fastmat.benchmarks.bench_{bench}").cases(device, short)


def run_cases(
    benches: Sequence[str],
    device: torch.device,
    *,
    short: bool,
    rows_file: Path,
    command: str,
    tell: Callable[[str], None],
) -> Iterator[QualityError]:
    """Measure, and append the rows of each case when it is done; yields the cases that the gate refused.

    tell: is told the title of each case before it begins.
    """
    versions, commit, machine = versions_of(LIBRARIES), commit_of(HERE), machine_of(device)
    for bench in benches:
        for case in cases_of(bench, device, short=short):
            tell(case.title)
            try:
                measured = measure(
                    case,
                    device,
                    seconds=0.05 if short else 10.0,
                    min_rounds=3 if short else 5,
                    child=partial(peak_in_child, bench, case.title, short=short),
                )
            except QualityError as error:
                yield error
                continue
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            append_rows(
                rows_file,
                [
                    row_of(
                        case,
                        one,
                        time=now,
                        device=device.type,
                        machine=machine,
                        threads=torch.get_num_threads(),
                        versions=versions,
                        commit=commit,
                        command=command,
                    )
                    for one in measured
                ],
            )
            del measured  # its inputs, before the next case makes its own
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def row_of(
    case: Case,
    measured: Measurement,
    *,
    time: str,
    device: str,
    machine: str,
    threads: int,
    versions: dict[str, str],
    commit: str | None,
    command: str,
) -> Row:
    p20, p50, p80 = (float(value) for value in np.quantile(measured.times, (0.2, 0.5, 0.8)))
    return Row(
        time=time,
        operator=case.operator,
        case=case.name,
        shape=dict(case.shape),
        dtype=case.dtype,
        implementation=measured.implementation.name,
        kind=measured.implementation.kind,
        rounds=len(measured.times),
        p20=p20,
        p50=p50,
        p80=p80,
        error=measured.error,
        tolerance=case.tolerance,
        repeatable=measured.repeatable,
        peak=measured.peak,
        moved=measured.implementation.moved,
        device=device,
        machine=machine,
        threads=threads,
        versions=versions,
        commit=commit,
        command=command,
    )


def versions_of(libraries: Sequence[str]) -> dict[str, str]:
    """Of Python, fastmat and the libraries that are installed."""
    found = {"python": platform.python_version(), "fastmat": metadata.version("fastmat-vlm")}
    for library in libraries:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit_of(folder: Path) -> str | None:
    """The short hash of fastmat's checkout, "-dirty" when its Python files differ from it; None outside a checkout."""
    root = folder.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changed else "")


def machine_of(device: torch.device) -> str:
    """The name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
