"""A tiny ALBEF and a tiny BLIP, hardened by two processes, whole and sharded: with negatives sought across them it is
the run of one process with the whole batch; stopped, each goes on bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from training.runs import run
from training.synthetic import weights_of
from training.test_engines import launch

pytestmark = pytest.mark.distributed
MODELS = ("albef", "blip")
TORCH, DEEPSPEED = ("ddp", "fsdp2"), ("zero2", "zero3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`alone/NAME`, and of two processes `ENGINE-2/NAME` and `ENGINE-2/again-NAME`."""
    out = tmp_path_factory.mktemp("matching")
    for name in MODELS:
        run(name, out / "alone" / name)
    for engines in (TORCH, DEEPSPEED):
        cases = [f"{engine}/{kind}{name}" for engine in engines for kind in ("", "again-") for name in MODELS]
        launch(out, 2, *cases, f"{engines[0]}/own")
    return out


def tensors(out: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return weights_of(out / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def same(one: Path, other: Path) -> None:
    """Moments, weights, momentum encoders and queues, after two steps and after four."""
    for step in (2, 4):
        state = json.loads((other / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
        assert state["skipped"] == 0
        # Rounding grows from step to step; moments are sums of gradients, and scaled with them.
        for name, atol in (("weights", 2e-5), ("optimizer", 5e-4), ("memory", 1e-5)):
            expected, found = tensors(one, step, name), tensors(other, step, name)
            assert expected.keys() == found.keys() and found
            for key, value in expected.items():
                # A key's bias adds the same to all logits of a softmax: its gradient is rounding alone.
                rounding = name != "memory" and ("key.bias" in key or "qkv.bias" in key)
                largest = max(float(value.abs().max()), 1e-6) if name == "optimizer" else 1.0
                tolerance = 2e-3 if rounding else atol * largest
                torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance, msg=f"{step} {name} {key}")


@pytest.mark.parametrize("engine", TORCH + DEEPSPEED)
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_are_one(runs: Path, engine: str, name: str) -> None:
    same(runs / "alone" / name, runs / f"{engine}-2" / name)


@pytest.mark.parametrize("engine", TORCH + DEEPSPEED)
@pytest.mark.parametrize("name", MODELS)
def test_goes_on_bit_for_bit(runs: Path, engine: str, name: str) -> None:
    whole, halves = (runs / f"{engine}-2" / kind for kind in (name, f"again-{name}"))
    for file in ("weights", "optimizer", "memory"):
        expected, found = tensors(whole, 4, file), tensors(halves, 4, file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), file
    assert (whole / "model.safetensors").read_bytes() == (halves / "model.safetensors").read_bytes()


def test_negatives_of_the_own_share(runs: Path) -> None:
    """Other negatives than across, and the same whatever holds the weights."""
    same(runs / "ddp-2" / "own", runs / "zero2-2" / "own")
    with pytest.raises(AssertionError, match="2 weights"):
        same(runs / "ddp-2" / "own", runs / "ddp-2" / "albef")
