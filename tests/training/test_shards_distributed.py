"""Two gloo processes with two workers each, on shards: every image of an epoch once, resumed at the exact sample.

Run by torchrun this file is the program of one of the two processes.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmat.cli.config import TrainConfig
from fastmat.cli.load import validate
from fastmat.cli.main import main as fastmat
from fastmat.cli.train import train_model
from fastmat.data.shard_index import index_shards
from fastmat.data.shards import ShardBatches, open_shards
from fastmat.types import ImageTransform

COUNTS = (5, 1, 9, 3, 4)
N, BATCH, STEPS, WORKERS = sum(COUNTS), 4, 12, 2
CASES = {"five": COUNTS, "one": (N,)}
BAD = {
    "batch_size=3": "the batch of 3 images cannot be divided among 2 processes",
    "batch_size=24": f"batch_size 24 is more than the {N} images in the shards of",
}


def write_shards(folder: Path, counts: tuple[int, ...]) -> None:
    """As a stranger would, with plain tarfile."""
    folder.mkdir()
    row = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for _ in range(count):
                buffer = io.BytesIO()
                pixels = np.random.default_rng(row).integers(256, size=(20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(buffer, "PNG")
                for name, data in (
                    (f"{row}.png", buffer.getvalue()),
                    (f"{row}.txt", f"red {row}\nblue {row}".encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                row += 1
    index_shards(folder)


def batches(folder: Path, *, workers: int) -> ShardBatches:
    dataset = open_shards(index=folder / "index.json", shuffle_buffer=6)
    return ShardBatches(dataset, ImageTransform(size=16), batch_size=BATCH, seed=2, workers=workers)


def seen(stream: ShardBatches, start: int, *, rank: int, world: int) -> list[dict[str, object]]:
    """What a process gets from step `start` on; an image by its digest."""
    return [
        {
            "index": batch.index.tolist(),
            "texts": batch.texts,
            "images": [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.images],
        }
        for batch in stream.iterate(start, STEPS, rank=rank, world=world)
    ]


def config(folder: Path) -> TrainConfig:
    values = {
        "model": "tiny",
        "data": {"name": "shards", "index": str(folder / "index.json"), "shuffle_buffer": 6},
        "defence": "finetune",
        "train": {"steps": 6, "save_every": 2, "keep_last": 9, "lr": 1e-3},
        "batch_size": BATCH,
        "workers": WORKERS,
    }
    return validate(TrainConfig, values, source="test")


def words(folder: Path, *more: str) -> list[str]:
    data = f"data={{name: shards, index: {folder / 'index.json'}}}"
    return ["train", "--out", str(folder.parent / "bad"), "model=tiny", "defence=finetune", data, *more]


def main() -> None:
    out, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for case in CASES:
        stream = batches(out / case, workers=WORKERS)
        found = {start: seen(stream, start, rank=rank, world=world) for start in (0, 7)}
        (out / f"{case}-{rank}.json").write_text(json.dumps(found))
    codes = [fastmat(words(out / "one", "train={steps: 2, save_every: 1}", bad)) for bad in BAD]
    (out / f"codes-{rank}.json").write_text(json.dumps(codes))
    torch.distributed.barrier()  # the group that the first command began
    train_model(config(out / "five"), out / "whole")
    # What a kill after the second step would have left.
    if rank == 0:
        shutil.copytree(out / "whole" / "checkpoints" / "step-00000002", out / "part" / "checkpoints" / "step-00000002")
    torch.distributed.barrier()
    train_model(config(out / "five"), out / "part", resume=True)
    torch.distributed.destroy_process_group()


def launch(*program: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *program], env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    for case, counts in CASES.items():
        write_shards(out / case, counts)
    done = launch(__file__, str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    (out / "said").write_text(done.stderr)
    return out


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_lost_or_repeated(ended: Path, case: str) -> None:
    """ "one": more processes, and more workers, than shards."""
    alone = seen(batches(ended / case, workers=0), 0, rank=0, world=1)
    first, second = (json.loads((ended / f"{case}-{rank}.json").read_text())["0"] for rank in (0, 1))
    assert len(first) == len(second) == STEPS
    for step, whole in enumerate(alone):
        assert len(first[step]["index"]) == len(second[step]["index"]) == BATCH // 2
        for key, value in whole.items():
            assert first[step][key] + second[step][key] == list(value), (step, key)
    per_epoch = N // BATCH
    for epoch in range(STEPS // per_epoch):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        images = [digest for step in steps for share in (first, second) for digest in share[step]["images"]]
        assert len(images) == len(set(images)) == per_epoch * BATCH


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_processes_resume_at_the_exact_sample(ended: Path, case: str) -> None:
    for rank in (0, 1):
        found = json.loads((ended / f"{case}-{rank}.json").read_text())
        assert len(found["7"]) == STEPS - 7 and found["7"] == found["0"][7:]


@pytest.mark.distributed
def test_resumed_training_is_training_never_stopped(ended: Path) -> None:
    whole, part = ended / "whole", ended / "part"
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (part / "checkpoints" / "step-00000001").exists()
    start, end = (whole / "checkpoints" / f"step-0000000{step}" / "weights.safetensors" for step in (2, 6))
    assert start.read_bytes() != end.read_bytes()


@pytest.mark.distributed
def test_bad_batches_end_all_processes_with_one_sentence(ended: Path) -> None:
    assert [json.loads((ended / f"codes-{rank}.json").read_text()) for rank in (0, 1)] == [[2] * len(BAD)] * 2
    said = (ended / "said").read_text()
    assert said.count("fastmat: ") == len(BAD)
    assert all(said.count(message) == 1 for message in BAD.values())
    assert not (ended / "bad").exists()


@pytest.mark.distributed
def test_a_damaged_sample_ends_all_processes(tmp_path: Path) -> None:
    """Only one of the two reads it."""
    write_shards(tmp_path / "one", (N,))
    shard = tmp_path / "one" / "0.tar"
    with tarfile.open(shard) as tar:
        place = tar.getmember("11.png").offset_data + 30
    data = bytearray(shard.read_bytes())
    data[place] ^= 255
    shard.write_bytes(data)
    settings = ("train={steps: 50, save_every: 50}", f"batch_size={N // 2 * 2}", "workers=2")
    done = launch("-m", "fastmat", *words(tmp_path / "one", *settings))
    assert done.returncode != 0
    assert "0.tar, sample 12: differs from its checksum in the index" in done.stderr


if __name__ == "__main__":
    main()
