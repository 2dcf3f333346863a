"""Peak memory of one contestant's step in a process that does nothing else; on a GPU the allocator counts in this one.

python -m fastmat.benchmarks.train.memory CHOICE STEP KIND DTYPE THREADS
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from fastmat.attacks.draws import SeededDraws
from fastmat.benchmarks.attacks.setting import Choice, Setting, prepare
from fastmat.benchmarks.memory import peak_memory
from fastmat.benchmarks.train.job import Dtype, Job
from fastmat.benchmarks.train.meter import Split
from fastmat.benchmarks.train.pairs import Pairs
from fastmat.benchmarks.train.suite import job_of

QUIET = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # large blocks go back at once


def peak_in_child(choice: Choice, step: str, kind: str, dtype: Dtype) -> int | None:
    """Bytes above model, optimiser and batch, on the CPU; None where the system does not say."""
    told = (json.dumps(dataclasses.asdict(choice)), step, kind, dtype, str(torch.get_num_threads()))
    command = [sys.executable, "-m", __name__, *told]
    child = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"peak memory of {step}, {kind} {dtype}: {child.stderr.strip().splitlines()[-1]}")
    found: int | None = json.loads(child.stdout.splitlines()[-1])
    return found


def peak_here(job_named: Callable[[str], Job], setting: Setting, step: str, kind: str, dtype: Dtype) -> int | None:
    job = job_named(step)
    who = next(one for one in job.contestants if (one.kind, one.dtype) == (kind, dtype))
    batch = job.batch(0)
    return peak_memory(lambda: who.step(batch, SeededDraws(0)), setting.device)


def main() -> None:
    choice, step, kind, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    chosen, device = Choice(**json.loads(choice)), torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(chosen, Path(folder), device)
        pairs = Pairs(chosen, setting.model, Path(folder) / "images", device)
        print(
            json.dumps(peak_here(lambda name: job_of(name, setting, Split(device), pairs), setting, step, kind, dtype))
        )


if __name__ == "__main__":
    main()
