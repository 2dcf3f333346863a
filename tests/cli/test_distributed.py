"""`fastmat train` under its launchers, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

TRAIN = ["model=tiny", "defence=finetune", "train={steps: 2, save_every: 1}", "batch_size=2"]
ONE = ["--cpu", "--num_processes", "1"]
TWO = ["--multi_gpu", "--num_processes", "2"]  # with `--cpu` accelerate would start one process
FIXED = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [ONE, TWO], ids=["one", "two"])
def test_launched_training_ends_and_one_process_speaks(
    settings: list[str], tmp_path: Path, processes: list[str]
) -> None:
    bin = Path(sys.executable).parent
    launch = [bin / "accelerate", "launch", *processes, *FIXED, bin / "fastmat", "train"]
    ended = subprocess.run(
        [*launch, *settings, *TRAIN, "--out", tmp_path / "out"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("2 steps of finetune") == 1
    assert ended.stderr == ""
    assert load_file(tmp_path / "out" / "model.safetensors")
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 1
