"""Two gloo processes on the CPU: shards of the global batch, averaged gradients, decisions taken together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training.synthetic import Synthetic, settings

from fastmat.defences.finetune import FineTune
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.ops import contrastive_loss
from fastmat.training.loop import train

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [*launcher, str(HERE / "two_processes.py"), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def rank_results(out, case):
    return [torch.load(out / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def shard_loss(model, part):
    out = model(part.images, model.tokenize(part.texts))
    return contrastive_loss(
        out.image.features,
        out.text.features,
        out.logit_scale,
        image_group=part.group,
        text_group=part.text_group,
    )


def by_hand(*, steps, skip=()):
    """The same update in one process: the mean of the two shards' gradients, clipped, AdamW, the schedule."""
    model = tiny_clip().train()
    told = settings(steps=3)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 1e-4}, {"params": rest, "weight_decay": 0.0}])
    rates = [1.0, 1.0, 0.5]  # one step of warm-up, then half a cosine over two
    for step, batch in enumerate(Synthetic().iterate(0, steps)):
        if step in skip:
            continue
        for start in (0, 2):
            loss = shard_loss(model, batch.rows(start, start + 2))
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = told.lr * rates[step]
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def first_loss_by_hand():
    batch = next(Synthetic().iterate(0, 1))
    return sum(shard_loss(tiny_clip().train(), batch.rows(start, start + 2)).item() for start in (0, 2)) / 2


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "skip"), [("plain", ()), ("nan", (1,))])
def test_two_processes_average_their_shards(trained, case, skip):
    first, second = rank_results(trained, case)
    expected = by_hand(steps=3, skip=skip)
    assert first["skipped"] == second["skipped"] == len(skip)
    for key, value in expected.items():
        assert torch.equal(first["weights"][key], second["weights"][key])
        torch.testing.assert_close(first["weights"][key], value, rtol=1e-3, atol=2e-4)
    start = tiny_clip().state_dict()
    assert any(float((expected[key] - start[key]).abs().max()) > 5e-3 for key in expected)
    assert (trained / case / "model.safetensors").is_file()
    lines = [json.loads(line) for line in (trained / case / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["loss"] == pytest.approx(first_loss_by_hand(), rel=1e-4)  # the mean over the processes


@pytest.mark.distributed
def test_an_odd_batch_stops_every_rank(trained):
    for rank in (0, 1):
        assert "5 images cannot be divided among 2 processes" in (trained / f"odd-{rank}.txt").read_text()
    assert not (trained / "odd").exists()


@pytest.mark.distributed
def test_another_number_of_processes_is_refused(trained):
    with pytest.raises(UserError, match="processes was 2, is now 1"):
        train(
            tiny_clip(), FineTune(), Synthetic(), settings=settings(steps=3), out=trained / "plain", resume=True,
            config={},
        )  # fmt: skip
