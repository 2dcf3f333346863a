"""Peak memory of one attack in a process that does nothing else; on a GPU the allocator counts in this one.

python -m fastmat.benchmarks.attacks.memory CHOICE ATTACK WHO DTYPE THREADS
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import cast

import torch

from fastmat.attacks.draws import SeededDraws
from fastmat.benchmarks.attacks.job import Dtype, Opponent
from fastmat.benchmarks.attacks.setting import Choice, Setting, prepare
from fastmat.benchmarks.attacks.suite import jobs_of
from fastmat.benchmarks.memory import peak_memory


def peak_in_child(choice: Choice, attack: str, who: Opponent, dtype: Dtype) -> int | None:
    """Bytes above models and inputs, on the CPU, where larger blocks go back to the system at once."""
    words = [json.dumps(dataclasses.asdict(choice)), attack, who, dtype, str(torch.get_num_threads())]
    child = subprocess.run(
        [sys.executable, "-m", "fastmat.benchmarks.attacks.memory", *words],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(f"peak memory of {attack}, {who}: {child.stderr.strip().splitlines()[-1]}")
    peak = child.stdout.split()[-1]
    return None if peak == "None" else int(peak)


def peak_here(setting: Setting, attack: str, who: Opponent, dtype: Dtype) -> int | None:
    job = next(job for job in jobs_of(attack.split(" ")[0], setting) if job.name == attack)
    runner = job.runner(setting, who, dtype, "both")
    return peak_memory(lambda: runner(SeededDraws(0)), setting.device)


def main() -> None:
    choice, attack, who, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(Choice(**json.loads(choice)), Path(folder), torch.device("cpu"))
        print(peak_here(setting, attack, cast("Opponent", who), cast("Dtype", dtype)))


if __name__ == "__main__":
    main()
