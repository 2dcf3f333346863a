"""Peak memory of one call above what stood before it: inputs are not in it, results and gradients are.

On a GPU the caching allocator counts. On the CPU the kernel's high-water mark of a process that does nothing else:
python -m fastmat.benchmarks.memory BENCH CASE IMPLEMENTATION THREADS SIZE
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes of `call`, after one call that fills caches; None where the system does not say."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if not os.access(REFERENCES, os.W_OK):
        return None
    REFERENCES.write_text("5")  # resets the high-water mark
    before = from_status("VmRSS")
    call()
    return from_status("VmHWM") - before


def from_status(key: str) -> int:
    """Bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def peak_in_child(bench: str, case: str, implementation: str, *, short: bool) -> int | None:
    """`peak_memory` on the CPU in a new process, whose allocator returns every larger block at once."""
    words = [bench, case, implementation, str(torch.get_num_threads()), "short" if short else "full"]
    child = subprocess.run(
        [sys.executable, "-m", "fastmat.benchmarks.memory", *words],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(f"peak memory of {implementation}: {child.stderr.strip().splitlines()[-1]}")
    peak = child.stdout.split()[-1]
    return None if peak == "None" else int(peak)


def main() -> None:
    from fastmat.benchmarks.suite import cases_of  # here, since the harness imports this file

    bench, name, implementation, threads, size = sys.argv[1:]
    torch.set_num_threads(int(threads))
    device = torch.device("cpu")
    case = next(case for case in cases_of(bench, device, short=size == "short") if case.title == name)
    work = case.build()
    call = next(one.call for one in work.implementations if one.name == implementation)
    print(peak_memory(call, device))


if __name__ == "__main__":
    main()
