"""`fastmat pack`: what it writes, what a kill leaves, and training from it."""

import errno
import json
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmat.data.pack import Packing, pack
from fastmat.data.retrieval import read_retrieval_set

Fastmat = Callable[..., tuple[int, str, str]]
SIZES = [(60, 40), (40, 61), (33, 33), (20, 50), (64, 64), (48, 32), (35, 90)]
MADE = {"generator": "eda", "model": "", "source": "a thing", "seed": 4, "made": "caption"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Seven pictures of several formats and sizes; one caption of the third was generated."""
    images = tmp_path / "images"
    images.mkdir()
    rows = []
    for row, (width, height) in enumerate(SIZES):
        name = f"{row}.{('png', 'jpg', 'webp')[row % 3]}"
        pixels = np.random.default_rng(row).integers(256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / name)
        rows += [{"image": name, "caption": [f"thing {row}", f"a thing, {row}"], "image_id": f"id-{row}"}]
    rows.append({"image": "2.webp", "caption": "thing of two", **MADE})
    rows[5]["group"] = rows[6]["group"] = "same"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    return tmp_path


def data(source: Path) -> str:
    files = {"annotations": str(source / "train.json"), "images": str(source / "images")}
    return f"data={json.dumps({'name': 'json', 'title': 'seven', 'split': 'train', **files})}"


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {f"{path.name}/{info.name}": tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_originals_are_kept_and_said(fastmat: Fastmat, source: Path) -> None:
    out = source / "shards"
    code, said, errors = fastmat("pack", "--out", out, "--images-per-shard", 3, data(source))
    assert (code, errors) == (0, "")
    assert said == f"7 samples in 3 shards: {out / 'index.json'}\n"
    found = members(out)
    assert [name for name in found if not name.endswith("json")] == [
        f"shard-00000{row // 3}.tar/00000000{row}.{('png', 'jpg', 'webp')[row % 3]}" for row in range(7)
    ]
    for name, content in found.items():
        row = int(Path(name).stem)
        kind = ("png", "jpg", "webp")[row % 3]
        if name.endswith("json"):
            told = json.loads(content)
            assert told["captions"][:2] == [f"thing {row}", f"a thing, {row}"]
            assert (told["image_id"], told["group"]) == (f"id-{row}", min(row, 5))
            assert told["provenance"] == ([None, None, MADE] if row == 2 else [None, None])
        else:
            assert content == (source / "images" / f"{row}.{kind}").read_bytes()
    index = json.loads((out / "index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [3, 3, 1]
    assert fastmat("pack", "--check", out)[:2] == (0, said)


def test_resized(fastmat: Fastmat, source: Path) -> None:
    out = source / "shards"
    assert fastmat("pack", "--out", out, "--resize", 33, "--quality", 60, data(source))[0] == 0
    for name, content in members(out).items():
        if name.endswith("json"):
            continue
        row = int(Path(name).stem)
        kind = ("png", "jpg", "webp")[row % 3]
        original = source / "images" / f"{row}.{kind}"
        (source / "member").write_bytes(content)
        with Image.open(original) as before, Image.open(source / "member") as after:
            if min(SIZES[row]) <= 33:
                assert content == original.read_bytes()
                continue
            assert after.format == "JPEG" and min(after.size) == 33
            assert abs(after.width / after.height - before.width / before.height) < 0.05
            shrunk = before.convert("RGB").resize(after.size, Image.Resampling.BICUBIC)
            shrunk.save(source / "expected", "JPEG", quality=60)
            assert content == (source / "expected").read_bytes()
    fine = source / "fine"
    assert fastmat("pack", "--out", fine, "--resize", 33, "--quality", 95, data(source))[0] == 0
    assert len(members(fine)["shard-000000.tar/000000000.jpg"]) > len(members(out)["shard-000000.tar/000000000.jpg"])


def test_after_a_mistake_the_rest_is_packed_as_if_there_had_been_none(fastmat: Fastmat, source: Path) -> None:
    settings = ("--images-per-shard", 2, data(source))
    assert fastmat("pack", "--out", source / "whole", *settings)[0] == 0
    picture = source / "images" / "4.jpg"
    good = picture.read_bytes()
    picture.write_bytes(good[: len(good) // 2])
    out = source / "shards"
    code, _, errors = fastmat("pack", "--out", out, *settings)
    assert code == 2 and errors.count("\n") == 1
    assert "row 5" in errors and "4.jpg: cannot be decoded" in errors
    assert sorted(files(out)) == ["packing.json", "shard-000000.tar", "shard-000001.tar"]  # nothing half-written
    code, _, errors = fastmat("pack", "--index", out)
    assert code == 2 and "2 of 4 shards are missing, shard-000002.tar first" in errors and "--resume" in errors
    picture.write_bytes(good)
    code, _, errors = fastmat("pack", "--out", out, *settings)
    assert code == 2 and "add --resume" in errors
    code, _, errors = fastmat("pack", "--out", out, "--resume", "--images-per-shard", 3, data(source))
    assert code == 2 and "another set was packed there, or otherwise" in errors
    before = (out / "shard-000000.tar").stat().st_mtime_ns
    assert fastmat("pack", "--out", out, "--resume", *settings)[0] == 0
    assert files(out) == files(source / "whole")
    assert (out / "shard-000000.tar").stat().st_mtime_ns == before
    assert fastmat("pack", "--out", out, "--resume", *settings)[0] == 0  # nothing left to do


def test_a_kill_in_a_shard(source: Path) -> None:
    dataset = read_retrieval_set(source / "train.json", source / "images", name="seven", split="train")
    pack(Packing(dataset=dataset, folder=source / "whole", images_per_shard=2))
    out = source / "shards"
    child = os.fork()
    if child == 0:
        load = dataset.load
        paths = dataset.load.paths  # type: ignore[attr-defined]

        def killed(row: int) -> Image.Image:
            if row == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return load(row)

        killed.paths = paths  # type: ignore[attr-defined]
        object.__setattr__(dataset, "load", killed)
        pack(Packing(dataset=dataset, folder=out, images_per_shard=2))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [path.name for path in sorted(out.glob("*.tar"))] == ["shard-000000.tar"]
    assert not (out / "index.json").exists()
    pack(Packing(dataset=dataset, folder=out, images_per_shard=2))
    assert files(out) == files(source / "whole")


def test_a_full_disk_leaves_nothing_half_written(
    fastmat: Fastmat, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = source / "shards", iter(range(99))

    def full(file: int) -> None:
        if next(calls) == 2:  # packing.json, the first shard, the second
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, _, errors = fastmat("pack", "--out", out, "--images-per-shard", 2, data(source))
    assert code == 2 and f"{out}/shard-000001.tar: No space left on device" in errors
    assert sorted(files(out)) == ["packing.json", "shard-000000.tar"]


def test_several_processes_write_the_same(fastmat: Fastmat, source: Path) -> None:
    for workers in (0, 2):
        settings = ("--workers", workers, "--images-per-shard", 2, "--resize", 30)
        assert fastmat("pack", "--out", source / str(workers), *settings, data(source))[0] == 0
    assert files(source / "0") == files(source / "2")
    (source / "images" / "4.jpg").write_bytes(b"")
    code, _, errors = fastmat("pack", "--out", source / "bad", "--workers", 2, "--images-per-shard", 2, data(source))
    assert code == 2 and errors.count("\n") == 1 and "4.jpg" in errors
    assert not list((source / "bad").glob(".*"))


def test_training_streams_them(fastmat: Fastmat, source: Path) -> None:
    out = source / "shards"
    assert fastmat("pack", "--out", out, "--images-per-shard", 2, data(source))[0] == 0
    (out / "index.json").unlink()
    shards = f"data={{name: shards, index: {out / 'index.json'}, shuffle_buffer: 3}}"
    settings = ("model=tiny", "defence=finetune", "batch_size=3", "seed=1")
    code, _, errors = fastmat("train", "--out", source / "run", *settings, shards, "train={steps: 6, save_every: 2}")
    assert code == 2 and f"there is no such index; `fastmat pack --index {out}` makes it" in errors
    assert fastmat("pack", "--index", out)[0] == 0
    train = ("train", *settings, shards, "train={steps: 6, save_every: 2, keep_last: 9}")
    assert fastmat(*train, "--out", source / "run")[0] == 0
    part = source / "part"
    assert fastmat(*train, "--out", part)[0] == 0
    for later in ("step-00000004", "step-00000006"):
        (part / "checkpoints" / later / "weights.safetensors").write_bytes(b"")
    (part / "model.safetensors").unlink()
    assert fastmat(*train, "--out", part, "--resume", "workers=1")[0] == 0
    assert (part / "model.safetensors").read_bytes() == (source / "run" / "model.safetensors").read_bytes()
    # Other content under the same name is another run.
    assert fastmat(*train, "--out", part, "--resume", "limit=6")[0] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "x", "--index", "y"), "not allowed with argument"),
        ((), "one of the arguments --out --index --check is required"),
        (("--index", "y", "limit=3"), "leave --config and key=value out"),
        (("--index", "absent"), "absent is no folder of shards"),
        (("--check", "absent"), "absent/index.json: there is no such index"),
        (("--out", "x", "--images-per-shard", "0"), "images_per_shard must be at least 1, got 0"),
        (("--out", "x", "--resize", "0"), "resize must be at least 1 pixel, got 0"),
        (("--out", "x", "--quality", "101"), "quality must be in 1..100, got 101"),
        (("--out", "x", "--workers", "-1"), "--workers must not be negative, got -1"),
        (("--out", "x", "--resume"), "has no packing.json to go on with"),
    ],
)
def test_bad_input(
    fastmat: Fastmat, source: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(source)
    words = (*words, data(source)) if "--out" in words else words
    code, _, errors = fastmat("pack", *words)
    assert code == 2 and message in errors and errors.count("\n") == 1
    assert not (source / "x").exists()


def test_evaluation_keeps_the_sets_in_memory(fastmat: Fastmat, source: Path) -> None:
    code, _, errors = fastmat("eval", "--out", source / "x", "victims={a: {model: tiny}}", "data={name: shards}")
    assert code == 2 and "data: unknown name 'shards'" in errors
