"""Commands under their launchers, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_processes import FIXED, TWO, in_two_processes

from fastmat.cli.main import main
from fastmat.evaluation.results import read_results

TRAIN = ["model=tiny", "defence=finetune", "train={steps: 2, save_every: 1}", "batch_size=2"]
ONE = ["--cpu", "--num_processes", "1"]


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


EVAL = ["victims.plain.model=tiny", "victims.other.model={name: tiny, seed: 1}", "resamples=20", "batch_size=1"]
ATTACKS = ["attacks={sga: {name: sga, steps: 1, scales: [0.5]}, pgd: {name: pgd, steps: 2}}", "threat.eps=8/255"]


@pytest.mark.distributed
def test_two_processes_attack_to_the_result_of_one(settings: list[str], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    words = [*settings, *EVAL, *ATTACKS, "keep_sets=true", "surrogates={s: {name: tiny, seed: 2}}", "subset.pgd=5"]
    assert main(["eval", *words, "--out", str(one)]) == 0
    ended = in_two_processes(["eval", *words, "--out", two])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("report.html") == 1
    timing = {"seconds", "pairs_per_s"}
    expected, found = ([row.model_dump(exclude=timing) for row in read_results(p).rows] for p in (one, two))
    assert expected == found and len(found) == 2 + 2 + 4
    files = sorted(file.relative_to(one) for pattern in ("*.safetensors", "*.jsonl") for file in one.rglob(pattern))
    assert len(files) == 6 + 5 + 2
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


@pytest.mark.distributed
def test_two_processes_rerank_to_the_result_of_one(settings: list[str], tmp_path: Path) -> None:
    """Fusion models, attacked through matching and ranked in two stages."""
    victims = [f"victims.{name}={{model: {{name: tiny_{name}}}, rerank_k: 3}}" for name in ("albef", "blip")]
    attack = "attacks.itm={name: pgd, steps: 2, objective: itm}"
    words = [*settings, *victims, attack, "threat.eps=8/255", "resamples=20", "batch_size=2", "examples=0"]
    assert main(["eval", *words, "--out", str(tmp_path / "one")]) == 0
    ended = in_two_processes(["eval", *words, "--out", tmp_path / "two"])
    assert ended.returncode == 0, ended.stderr
    timing = {"seconds", "pairs_per_s"}
    expected, found = (
        [row.model_dump(exclude=timing) for row in read_results(tmp_path / p).rows] for p in ("one", "two")
    )
    assert expected == found
    assert {(row["victim"], row["scoring"]) for row in found} == {("albef", "itm"), ("blip", "itm+cosine")}


@pytest.mark.distributed
@pytest.mark.parametrize(("rank", "kind"), [(0, "SIGTERM"), (1, "SIGTERM"), (1, "SIGKILL")])
def test_a_process_that_stops_stops_all_and_the_set_goes_on(
    settings: list[str], tmp_path: Path, rank: int, kind: str
) -> None:
    """One of two processes gets a signal in its second batch; one process finishes what they began."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = [*settings, "model=tiny", "attack={name: pgd, steps: 2}", "threat.eps=8/255", "batch_size=1"]
    assert main(["attack", *words, "--out", str(whole)]) == 0
    program = tmp_path / "stopped.py"
    program.write_text(STOPPED.format(rank=rank, kind=kind, words=["attack", *words, "--out", str(parts)]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*launcher, program], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    expected = "4 of 6 images are saved" if kind == "SIGTERM" else "another process ended"
    assert f"fastmat: interrupted; {expected}" in ended.stderr
    assert main(["attack", *words, "--out", str(parts), "--resume"]) == 0
    left, right = (
        torch.cat([load_file(file)["images"] for file in sorted(folder.glob("*.safetensors"))])
        for folder in (whole, parts)
    )
    assert torch.equal(left, right)
    assert (whole / "texts.jsonl").read_bytes() == (parts / "texts.jsonl").read_bytes()


STOPPED = """
import os, signal, sys
from fastmat.attacks.pgd import PGD
from fastmat.cli.main import main

run, calls = PGD.run, []

def counting(self, *values):
    calls.append(None)
    if len(calls) == 2 and os.environ["RANK"] == "{rank}":
        signal.raise_signal(signal.{kind})
    return run(self, *values)

PGD.run = counting
sys.exit(main({words}))
"""


@pytest.mark.distributed
def test_a_mistake_is_said_once(settings: list[str], tmp_path: Path) -> None:
    ended = in_two_processes(
        ["eval", *settings, *EVAL, *ATTACKS, "data.annotations=nowhere.json", "--out", tmp_path / "out"]
    )
    assert ended.returncode != 0
    assert ended.stderr.count("fastmat: ") == 1
    assert not (tmp_path / "out").exists()
