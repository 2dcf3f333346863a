"""Every method in two processes, with whole and with sharded weights: the run is that of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from defences.methods_worker import METHODS, run
from training.synthetic import weights_of

HERE = Path(__file__).parent
CASES = [f"{engine}/{name}" for engine in ("ddp", "zero3") for name in METHODS]
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    out = tmp_path_factory.mktemp("together")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [*launcher, str(HERE / "methods_worker.py"), str(out), *CASES],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(together, tmp_path, case):
    """The first moments of AdamW tell it: sums of gradients, which in the weights are blown up to the learning rate."""
    name = case.split("/")[1]
    run(name, tmp_path / name)
    step = Path("checkpoints") / "step-00000003"
    expected, found = (
        weights_of(folder / step / "optimizer.safetensors") for folder in (tmp_path / name, together / case)
    )
    assert expected.keys() == found.keys() and found
    for key, value in expected.items():
        # A key's bias adds the same to all logits of a softmax: its gradient is rounding alone.
        tolerance = 2e-3 if "in_proj_bias" in key else 1e-3 * max(float(value.abs().max()), 1e-6)
        torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance, msg=key)
