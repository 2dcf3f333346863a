"""A command of fastmat in two processes, on the CPU, as a user launches it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# With `--cpu` accelerate would start one process.
TWO = ["--multi_gpu", "--num_processes", "2"]
FIXED = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def in_two_processes(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    launcher = [Path(sys.executable).parent / "accelerate", "launch", *TWO, *FIXED, "-m", "fastmat"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=120)
