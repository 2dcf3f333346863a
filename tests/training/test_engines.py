"""Every engine, 2 and 4 gloo processes on the CPU: the run is that of one process with the whole batch."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training.runs import run
from training.synthetic import weights_of

HERE = Path(__file__).parent
pytestmark = pytest.mark.distributed


def launch(out: Path, processes: int, *cases: str) -> Path:
    """Run the cases, "ENGINE/NAME", one after the other in one group of processes; `out/ENGINE-PROCESSES/NAME`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [*launcher, str(HERE / "engines_worker.py"), str(out), *cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs of one process, by name."""
    folder = tmp_path_factory.mktemp("alone")

    def of(name):
        if not (folder / name).exists():
            run(name, folder / name)
        return folder / name

    return of


TWO = [f"ddp/{name}" for name in ("finetune", "fare", "tecoa_itr", "nan", "hot", "micro", "recompute")]
TWO += [f"fsdp2/{name}" for name in ("finetune", "fare", "tecoa_itr", "nan", "hot", "micro", "recompute")]
ZERO = [f"zero{stage}/{name}" for stage in (1, 2, 3) for name in ("finetune", "tecoa_itr", "nan", "hot", "micro")]
ZERO += ["zero3/fare", "zero3/recompute"]
FOUR = [f"{engine}/finetune" for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3")]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The runs of several processes, by their number."""
    started: dict[tuple[int, bool], Path] = {}

    def of(processes, case):
        cases = FOUR if processes == 4 else ZERO if case in ZERO else TWO
        key = (processes, case in ZERO)
        if key not in started:
            started[key] = launch(tmp_path_factory.mktemp("several"), processes, *cases)
        engine, name = case.split("/")
        return started[key] / f"{engine}-{processes}" / name

    return of


@pytest.mark.parametrize(
    ("processes", "case"), [*((2, case) for case in TWO + ZERO), *((4, case) for case in FOUR)], ids=str
)
def test_several_processes_are_one(alone, together, processes, case):
    """Moments are sums of gradients, so they tell more than weights, in which AdamW blows rounding up to the rate."""
    engine, name = case.split("/")
    one, several = alone(name), together(processes, case)
    state = json.loads((several / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["written_by"] == {"processes": processes, "engine": engine}
    assert state["skipped"] == (name == "nan")
    start = weights_of(one / "model.safetensors")
    for step in (4,) if name == "nan" else (2, 4):
        for file, atol in (("optimizer", 2e-5), ("weights", 1e-4)):
            path = Path("checkpoints") / f"step-{step:08d}" / f"{file}.safetensors"
            expected, found = weights_of(one / path), weights_of(several / path)
            assert expected.keys() == found.keys() and found
            for key, value in expected.items():
                # A key's bias adds the same to all logits of a softmax: its gradient is rounding alone.
                skip = "in_proj_bias" in key
                largest = 1.0 if file == "weights" or skip else float(value.abs().max())
                tolerance = 2e-3 if skip else atol * max(largest, 1e-6)
                torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance, msg=f"{path} {key}")
    moved = weights_of(several / "checkpoints" / "step-00000002" / "weights.safetensors") if name != "nan" else {}
    assert all(not torch.equal(start[key], value) for key, value in moved.items() if key == "image_projection.weight")
    logs = [[json.loads(line) for line in (p / "log.jsonl").read_text().splitlines()] for p in (one, several)]
    losses = [[math.nan if line["loss"] is None else line["loss"] for line in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, nan_ok=True)
    if name == "hot":
        assert float(weights_of(several / "model.safetensors")["log_logit_scale"].exp()) <= 100.01


def test_any_engine_and_any_number_of_processes_goes_on_with_any_checkpoint(alone, tmp_path):
    """ZeRO-2 does one step, FSDP2 the second, ZeRO-3 the third, and one process the last; SIGTERM ends each."""
    launch(tmp_path, 2, "zero2/until1", "fsdp2/until2", "zero3/until3")
    out = tmp_path / "handed-over"
    with pytest.warns(
        UserWarning, match=r"written by 2 process\(es\), engine zero3; going on from the same sample with 1"
    ):
        report = run("finetune", out, resume=True)
    assert report.resumed_from == 3
    path = Path("checkpoints") / "step-00000004" / "optimizer.safetensors"
    expected, found = weights_of(alone("finetune") / path), weights_of(out / path)
    for key, value in expected.items():
        if "in_proj_bias" not in key:
            tolerance = 2e-5 * float(value.abs().max())
            torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance, msg=key)
