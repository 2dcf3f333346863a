import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmat.data import image_cache
from fastmat.data.digits import digits_set
from fastmat.data.loader import TrainingBatches, evaluation_batches
from fastmat.data.retrieval import RetrievalSet, read_retrieval_set
from fastmat.errors import UserError
from fastmat.types import ImageTransform

TRANSFORM = ImageTransform(size=8)
N = 11


@pytest.fixture
def pictures(tmp_path: Path) -> RetrievalSet:
    rng = np.random.default_rng(0)
    for i in range(N):
        Image.fromarray(rng.integers(0, 256, (12, 9 + i, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return read(tmp_path)


def read(folder: Path) -> RetrievalSet:
    rows = [{"image": f"{i}.png", "caption": [f"{i} a", f"{i} b"]} for i in range(N)]
    (folder / "set.json").write_text(json.dumps(rows))
    return read_retrieval_set(folder / "set.json", folder, name="x", split="test")


def evaluated(dataset: RetrievalSet, cache: Path | None, workers: int = 0, transform: ImageTransform = TRANSFORM):
    batches = evaluation_batches(dataset, transform, batch_size=4, workers=workers, image_cache=cache)
    return torch.cat([batch.images for batch in batches])


def only(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


class Broken:
    """A set whose pictures cannot be decoded any more; `paths` of the real one."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self.paths = paths

    def __call__(self, row: int) -> Image.Image:
        raise UserError(f"row {row} was decoded")


def undecodable(dataset: RetrievalSet) -> RetrievalSet:
    return RetrievalSet(**{**vars(dataset), "load": Broken(dataset.load.paths)})


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_decoder(pictures: RetrievalSet, tmp_path: Path, workers: int) -> None:
    cache = tmp_path / "cache"
    decoded = evaluated(pictures, None)
    assert torch.equal(evaluated(pictures, cache, workers), decoded)
    assert sorted(path.name for path in only(cache).iterdir()) == ["images.u8", "manifest.json"]
    assert (only(cache) / "images.u8").stat().st_size == N * 3 * 8 * 8
    # From now on nothing is decoded, for evaluation or training, in order or not.
    stored = undecodable(pictures)
    assert torch.equal(evaluated(stored, cache, workers), decoded)
    settings = {"batch_size": 3, "seed": 1, "workers": workers}
    cached = list(TrainingBatches(stored, TRANSFORM, image_cache=cache, **settings).iterate(0, 6))
    plain = list(TrainingBatches(pictures, TRANSFORM, **settings).iterate(0, 6))
    assert all(torch.equal(a.images, b.images) and a.texts == b.texts for a, b in zip(cached, plain, strict=True))
    alone = TrainingBatches(stored, TRANSFORM, image_cache=cache, **settings).batch(4)
    assert torch.equal(alone.images, plain[4].images)


def test_another_picture_rule_or_set_is_another_cache(pictures: RetrievalSet, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    evaluated(pictures, cache)
    for other in (ImageTransform(size=6), ImageTransform(size=8, mode="crop")):
        assert torch.equal(evaluated(pictures, cache, transform=other), evaluated(pictures, None, transform=other))
    assert torch.equal(evaluated(pictures.take(5), cache), evaluated(pictures.take(5), None))
    assert len(list(cache.iterdir())) == 4
    # A file that changed under its name: once by its size, once by its time alone.
    Image.new("RGB", (20, 20), (255, 0, 0)).save(tmp_path / "3.png")
    assert torch.equal(evaluated(read(tmp_path), cache), evaluated(read(tmp_path), None))
    os.utime(tmp_path / "3.png", ns=(1, 1))
    evaluated(read(tmp_path), cache)
    assert len(list(cache.iterdir())) == 6


def test_a_set_without_files_is_known_by_its_pixels(tmp_path: Path) -> None:
    transform = ImageTransform(size=16)
    for seed in (0, 1):
        digits = digits_set("val", seed=seed).take(6)
        decoded = evaluated(digits, None, transform=transform)
        assert torch.equal(evaluated(digits, tmp_path, transform=transform), decoded)
    evaluated(digits_set("val", seed=0).take(6), tmp_path, transform=transform)
    assert len(list(tmp_path.iterdir())) == 2


def test_damage_is_refused(pictures: RetrievalSet, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    evaluated(pictures, cache)
    pixels, manifest = only(cache) / "images.u8", only(cache) / "manifest.json"
    whole, said = pixels.read_bytes(), manifest.read_text()
    other = json.dumps(json.loads(said) | {"made_of": {}})
    for path, content in [
        (pixels, whole[:-1]),
        (pixels, whole[:700] + bytes([whole[700] ^ 1]) + whole[701:]),
        (manifest, said[:-5].encode()),
        (manifest, b"[]"),
        (manifest, other.encode()),
    ]:
        before = path.read_bytes()
        path.write_bytes(content)
        image_cache._mapped.cache_clear()
        with pytest.raises(UserError, match=r"image cache .* is damaged: delete this folder"):
            evaluated(pictures, cache)
        path.write_bytes(before)
    manifest.unlink()
    with pytest.raises(UserError, match="is damaged"):
        evaluated(pictures, cache)


def test_a_picture_that_cannot_be_decoded_leaves_nothing(pictures: RetrievalSet, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="row 0 was decoded"):
        evaluated(undecodable(pictures), cache)
    assert list(cache.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"image_cache .*file cannot be used"):
        evaluated(pictures, tmp_path / "file")


def build(folder: Path, cache: Path, results: "multiprocessing.Queue[float]") -> None:
    results.put(float(evaluated(read_retrieval_set(folder / "set.json", folder, name="x", split="test"), cache).sum()))


def test_several_processes_may_make_one_cache(pictures: RetrievalSet, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[float] = context.Queue()
    processes = [context.Process(target=build, args=(tmp_path, tmp_path / "cache", results)) for _ in range(3)]
    for process in processes:
        process.start()
    sums = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert sums == {float(evaluated(pictures, None).sum())}
    assert only(tmp_path / "cache").name[0] != "."


def test_the_first_to_finish_wins_and_a_killed_one_is_not_read(pictures: RetrievalSet, tmp_path: Path) -> None:
    cache, decoded = tmp_path / "cache", evaluated(pictures, None)

    def overtaken() -> list[torch.Tensor]:
        evaluated(pictures, cache)  # another process finishes while this one still decodes
        return [decoded.mul(255).round().to(torch.uint8)]

    opened = image_cache.open_image_cache(cache, pictures, TRANSFORM, overtaken)
    assert opened.folder == only(cache)
    half = cache / f".{opened.folder.name}.1-0"  # as a kill leaves it
    half.mkdir()
    (half / "images.u8").write_bytes(b"half")
    assert torch.equal(evaluated(undecodable(pictures), cache), decoded)


def test_a_tensor_of_the_cache_is_the_file_itself_and_writing_does_not_reach_it(pictures, tmp_path: Path) -> None:
    cache = evaluation_batches(pictures, TRANSFORM, batch_size=4, image_cache=tmp_path / "cache").picture
    assert cache(2).data_ptr() == cache(2).data_ptr()
    before = (only(tmp_path / "cache") / "images.u8").read_bytes()
    cache(2).zero_()
    assert (only(tmp_path / "cache") / "images.u8").read_bytes() == before
    image_cache._mapped.cache_clear()
