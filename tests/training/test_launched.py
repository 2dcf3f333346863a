"""`fastmat train` under the launchers that users have: shipped engine files, bad input, signals, a killed process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training.synthetic import weights_of

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ACCELERATE_LOG_LEVEL": "error"}
RUN = (
    "model=tiny",
    "data.name=digits",
    "data.split=train",
    "limit=64",
    "defence=finetune",
    "batch_size=8",
    "train.steps=6",
    "train.log_every=1",
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastmat")


def accelerate(engine: str, *more: str) -> tuple[str, ...]:
    file = ROOT / "configs" / "accelerate" / f"{engine}.yaml"
    launch = ("-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2", *more)
    return (*launch, str(Path(sys.executable).parent / "fastmat"))


def deepspeed(engine: str) -> tuple[str, ...]:
    file = ROOT / "configs" / "deepspeed" / f"{engine}.json"
    launch = ("-m", "accelerate.commands.launch", "--use_deepspeed", "--deepspeed_config_file", str(file))
    return (*launch, "--num_machines", "1", "--num_processes", "2", str(Path(sys.executable).parent / "fastmat"))


def train(launcher: tuple[str, ...], out: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "train", "--out", str(out), *RUN, *settings]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def sentences(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("fastmat: ")]


def started(launcher: tuple[str, ...], out: Path, *settings: str) -> subprocess.Popen[str]:
    """A long run that has done some steps more than there are in `out`."""
    log, until = out / "log.jsonl", time.monotonic() + 600

    def steps() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    wanted = steps() + 3
    command = [sys.executable, *launcher, "train", "--out", str(out), *RUN, "train.steps=100000", *settings]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while steps() < wanted:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.05)
    return process


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes that the launcher started, by rank."""
    ranks = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == launcher.pid:
            ranks.update({int(entry[5:]): int(folder.name) for entry in environment if entry.startswith(b"RANK=")})
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    done = train(("-m", "fastmat"), out)
    assert done.returncode == 0, done.stderr
    return weights_of(out / "model.safetensors")


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2", "zero3.json"])
def test_shipped_files_start_their_engine_and_the_weights_are_those_of_one_process(tmp_path, alone, engine):
    name, _, json_file = engine.partition(".")
    done = train(deepspeed(name) if json_file else accelerate(name), tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["written_by"] == {"processes": 2, "engine": name}
    for key, value in weights_of(tmp_path / "run" / "model.safetensors").items():
        tolerance = 2e-3 if "in_proj_bias" in key else 1e-4  # a key's bias has no gradient but rounding
        torch.testing.assert_close(value, alone[key], rtol=0, atol=tolerance, msg=key)


@pytest.mark.parametrize(
    ("launcher", "settings", "said"),
    [
        (TORCHRUN, ("batch_size=9",), "the batch of 9 images cannot be divided among 2 processes; set batch_size"),
        (accelerate("zero3"), ("train.compile=true",), "train.compile does not work with ZeRO stage 3"),
        (accelerate("fsdp2", "--fsdp_version", "1"), (), "set fsdp_version to 2"),
    ],
)
def test_bad_input_is_one_sentence_and_no_hang(tmp_path, launcher, settings, said):
    began = time.monotonic()
    done = train(launcher, tmp_path / "run", *settings)
    assert time.monotonic() - began < 240  # imports on a busy machine; a hang would be gloo's half hour
    assert len(sentences(done)) == 1 and said in sentences(done)[0], done.stderr[-3000:]
    assert "exitcode  : 2" in done.stderr or done.returncode == 2, done.stderr[-3000:]


def test_another_model_is_one_sentence_and_exit_code_2_in_every_process(tmp_path):
    out = tmp_path / "run"
    assert train(TORCHRUN, out, "train.steps=2").returncode == 0
    done = train(TORCHRUN, out, "train.steps=2", "model.seed=3", "--resume")
    assert len(sentences(done)) == 1 and "belongs to another run: config.model.seed was None, is now 3" in done.stderr
    assert "exitcode  : 2" in done.stderr


def test_sigterm_saves_and_exits_with_0_within_the_grace_time(tmp_path):
    """To every process, as schedulers send it."""
    launcher = started(TORCHRUN, tmp_path / "run")
    pids = workers(launcher)
    assert len(pids) == 2
    began = time.monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    said, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0 and time.monotonic() - began < 120  # a step, a save and the end of Python
    saved = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(saved) == 1 and f"stopped; saved in {saved[0]}" in said
    assert int(saved[0].name.removeprefix("step-")) >= 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_and_the_last_checkpoint_goes_on(tmp_path, rank):
    """SIGKILL in a step; the other one notices, says so, and does not wait."""
    out = tmp_path / "run"
    launcher = started(TORCHRUN, out, "train.save_every=2")
    os.kill(workers(launcher)[rank], signal.SIGKILL)
    _, said = launcher.communicate(timeout=300)
    assert launcher.returncode != 0
    assert f"Signal {signal.SIGKILL.value} (SIGKILL)" in said  # torchrun names the first one that failed
    last = max(out.glob("checkpoints/step-*"))
    steps = int(last.name.removeprefix("step-"))
    resumed = started(TORCHRUN, out, "train.save_every=2", "--resume")
    for pid in workers(resumed):
        os.kill(pid, signal.SIGTERM)
    resumed.communicate(timeout=300)
    assert resumed.returncode == 0
    lines = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines)) and steps < int(max(out.glob("checkpoints/step-*")).name.removeprefix("step-"))


def test_a_process_killed_in_a_save_leaves_the_checkpoint_before(tmp_path):
    """The first process is killed between the files of its second checkpoint and the rename that completes it."""
    out = tmp_path / "run"
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import os, signal, sys\n"
        "if os.environ.get('RANK') == '0':\n"
        "    import fastmat.training.checkpoint as checkpoint\n"
        "    real = checkpoint.flush\n"
        "    def flush(path):\n"
        "        real(path)\n"
        "        if path.name == '.step-00000004.partial':\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "    checkpoint.flush = flush\n"
    )
    command = [sys.executable, *TORCHRUN, "train", "--out", str(out), *RUN, "train.save_every=2"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-00000002", ".step-00000004.partial"}
    done = train(TORCHRUN, out, "train.save_every=2", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert names == {"step-00000004", "step-00000006"}
    whole = tmp_path / "whole"
    assert train(TORCHRUN, whole, "train.save_every=2").returncode == 0
    first, second = (weights_of(folder / "model.safetensors") for folder in (whole, out))
    assert all(torch.equal(first[key], second[key]) for key in first)  # bit for bit, with two processes
