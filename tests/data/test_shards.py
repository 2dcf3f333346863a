import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmat.data.pack import Packing, pack
from fastmat.data.retrieval import RetrievalSet
from fastmat.data.shard_index import check_shards, index_shards, read_index
from fastmat.data.shards import ShardBatches, Shuffle, open_shards
from fastmat.errors import UserError
from fastmat.types import Batch, ImageTransform

TRANSFORM = ImageTransform(size=8, mode="crop")
N = 23


def draw(row: int) -> Image.Image:
    pixels = np.random.default_rng(row).integers(256, size=(11, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def pictures() -> RetrievalSet:
    return RetrievalSet(
        name="pictures",
        split="train",
        captions=tuple(tuple(f"{row}/{i}" for i in range(1 + row % 4)) for row in range(N)),
        ids=tuple(f"id-{row}" for row in range(N)),
        group=tuple(row // 2 for row in range(N)),
        load=draw,
    )


@pytest.fixture(scope="module")
def packed(pictures: RetrievalSet, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    pack(Packing(dataset=pictures, folder=folder, images_per_shard=5))
    return folder


@pytest.fixture
def own(packed: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def batches(folder: Path, *, buffer: int = 7, workers: int = 0, seed: int = 3, **changes: int) -> ShardBatches:
    settings = {"batch_size": 4, "captions_per_image": 2} | changes
    dataset = open_shards(index=folder / "index.json", shuffle_buffer=buffer)
    return ShardBatches(dataset, TRANSFORM, seed=seed, workers=workers, **settings)


def same(a: Batch, b: Batch) -> bool:
    tensors = all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("images", "txt2img", "index", "group"))
    return tensors and a.texts == b.texts


def joined(parts: tuple[Batch, ...]) -> Batch:
    """The global batch of a step, put together by hand from the processes' shares."""
    before = [0, *itertools.accumulate(map(len, parts))]
    return Batch(
        images=torch.cat([part.images for part in parts]),
        texts=sum((part.texts for part in parts), ()),
        txt2img=torch.cat([part.txt2img + first for part, first in zip(parts, before, strict=False)]),
        index=torch.cat([part.index for part in parts]),
        group=torch.cat([part.group for part in parts]),
    )


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def picture(level: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 11), (level, 255 - level, 7)).save(buffer, kind)
    return buffer.getvalue()


def test_a_sample_is_what_the_set_has(packed: Path, pictures: RetrievalSet) -> None:
    stream = batches(packed, captions_per_image=99)
    for batch in stream.iterate(0, stream.steps_per_epoch):
        assert batch.images.dtype == torch.float32
        for place, row in enumerate(batch.index.tolist()):
            assert torch.equal(batch.images[place], TRANSFORM(pictures.load(row)).float() / 255)
            texts = [t for t, image in zip(batch.texts, batch.txt2img.tolist(), strict=True) if image == place]
            assert sorted(texts) == sorted(pictures.captions[row])
        # Numbers of groups may be others; who shares one may not.
        assert torch.equal(batch.group[:, None] == batch.group, batch.index[:, None] // 2 == batch.index // 2)


@pytest.mark.parametrize("buffer", [1, 3, 7, 100])
def test_the_order_is_shards_in_a_row_shuffled_by_the_buffer(buffer: int) -> None:
    """Against the whole epoch written out."""
    counts, seed, epoch = (5, 1, 0, 8, 4), 11, 2
    sets = [list(range(sum(counts[:k]), sum(counts[: k + 1]))) for k in range(len(counts))]
    stream = [s for k in np.random.default_rng([seed, 0, epoch]).permutation(len(counts)) for s in sets[k]]
    expected = []
    for window, start in enumerate(range(0, len(stream), buffer)):
        inside = stream[start : start + buffer]
        expected += [inside[i] for i in np.random.default_rng([seed, 1, epoch, window]).permutation(len(inside))]
    shuffle = Shuffle(counts=counts, buffer=buffer, seed=seed)
    assert sorted(expected) == list(range(sum(counts)))
    for start, stop in itertools.combinations(range(sum(counts) + 1), 2):
        assert shuffle.samples(epoch, start, stop).tolist() == expected[start:stop]


def test_epochs_hold_no_image_twice_and_differ(packed: Path) -> None:
    stream = batches(packed)
    assert stream.steps_per_epoch == 5
    seen = [torch.cat([b.index for b in stream.iterate(5 * e, 5 * e + 5)]).tolist() for e in range(3)]
    assert all(len(set(epoch)) == 20 for epoch in seen)
    assert len({tuple(epoch) for epoch in seen}) == 3
    other = torch.cat([b.index for b in batches(packed, seed=4).iterate(0, 5)]).tolist()
    assert other != seen[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_any_process_resumes_at_any_step(packed: Path, workers: int) -> None:
    whole = list(batches(packed).iterate(0, 12))
    for world in (1, 2, 4):  # two and four read five shards between them
        shares = [
            list(batches(packed, workers=workers).iterate(7, 12, rank=rank, world=world)) for rank in range(world)
        ]
        assert all(len(batch) == 4 // world for share in shares for batch in share)
        for step, parts in zip(range(7, 12), zip(*shares, strict=True), strict=True):
            assert same(joined(parts), whole[step])


def test_more_processes_than_shards(pictures: RetrievalSet, tmp_path: Path) -> None:
    pack(Packing(dataset=pictures, folder=tmp_path, images_per_shard=N))
    whole = next(batches(tmp_path).iterate(0, 1))
    shares = tuple(next(batches(tmp_path).iterate(0, 1, rank=rank, world=4)) for rank in range(4))
    assert same(joined(shares), whole)


def test_captions_are_drawn_anew_without_replacement(packed: Path, pictures: RetrievalSet) -> None:
    stream = batches(packed)
    seen: dict[int, set[str]] = {}
    for batch in stream.iterate(0, 20 * stream.steps_per_epoch):
        for place, row in enumerate(batch.index.tolist()):
            own = [t for t, image in zip(batch.texts, batch.txt2img.tolist(), strict=True) if image == place]
            assert len(own) == len(set(own)) == min(2, 1 + row % 4)
            seen.setdefault(row, set()).update(own)
    assert all(seen[row] == set(pictures.captions[row]) for row in range(N))


def test_a_window_of_the_stream_touches_few_shards(packed: Path) -> None:
    shuffle = batches(packed, buffer=5).shuffle
    for start in range(0, 20, 5):
        assert len({sample // 5 for sample in shuffle.samples(0, start, start + 5)}) <= 2


def test_take_is_the_first_samples(packed: Path) -> None:
    few = open_shards(index=packed / "index.json").take(7)
    stream = ShardBatches(few, TRANSFORM, batch_size=7, seed=0)
    assert few.n_images == 7 and stream.steps_per_epoch == 1
    assert sorted(next(stream.iterate(5, 6)).index.tolist()) == list(range(7))
    with pytest.raises(UserError, match="have 7 images, cannot take 8"):
        few.take(8)
    assert few.fingerprint() != open_shards(index=packed / "index.json").fingerprint()


def test_the_global_random_stream_is_left_alone(packed: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(batches(packed, workers=1).iterate(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_stopping_early_leaves_no_process_behind(packed: Path) -> None:
    before = len(multiprocessing.active_children())
    stream = batches(packed, workers=2).iterate(0, 100)
    next(stream)
    assert len(multiprocessing.active_children()) == before + 2
    stream.close()
    assert len(multiprocessing.active_children()) == before


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("member", ["000000011.png", "000000011.json"])
def test_a_damaged_sample_is_found_by_its_checksum(own: Path, member: str, workers: int) -> None:
    shard = own / "shard-000002.tar"
    with tarfile.open(shard) as tar:
        flip(shard, tar.getmember(member).offset_data + 20)
    stream = batches(own, workers=workers)
    message = r"shard-000002\.tar, sample 2: differs from its checksum in the index; the shard is damaged"
    with pytest.raises(UserError, match=message):
        list(stream.iterate(0, 2 * stream.steps_per_epoch))
    with pytest.raises(UserError, match=r"shard-000002\.tar: its sha256 is not the one in the index"):
        check_shards(own)
    order = stream.shuffle.samples(0, 0, 20).tolist()
    assert 11 in order  # by this seed; its step and rank are the only ones to complain
    step, inside = divmod(order.index(11), 4)
    rank = inside // 2
    next(stream.iterate(step, step + 1, rank=1 - rank, world=2))
    with pytest.raises(UserError, match=message):
        next(stream.iterate(step, step + 1, rank=rank, world=2))


def test_missing_and_truncated_shards_are_found_at_once(own: Path) -> None:
    shard = own / "shard-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(UserError, match=r"shard-000001\.tar: \d+ bytes, but \d+ in the index; fetch it again"):
        batches(own)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar: this shard is in the index, but missing"):
        batches(own)


@pytest.mark.parametrize("file", ["index.json", "samples.npy"])
@pytest.mark.parametrize("how", ["cut", "flip", "gone", "empty"])
def test_a_damaged_index_is_refused_and_made_again(own: Path, packed: Path, file: str, how: str) -> None:
    path = own / file
    if how == "flip":  # a sample's group, the number of samples
        flip(path, -1 if file == "samples.npy" else path.read_bytes().index(b"23"))
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] if how == "cut" else b"")
    with pytest.raises(UserError, match=rf"fastmat pack --index {own}` makes it of the shards there"):
        batches(own)
    index_shards(own)
    assert same(next(batches(own).iterate(3, 4)), next(batches(packed).iterate(3, 4)))
    assert (own / file).read_bytes() == (packed / file).read_bytes()
    assert not list(own.glob(".*"))


class Bomb:
    """Unpickling it leaves a file behind."""

    def __reduce__(self):
        return (Path("unpickled-by-fastmat").touch, ())


def test_nothing_is_unpickled(own: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(own / "samples.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    index = json.loads((own / "index.json").read_text())
    index["samples_sha256"] = hashlib.sha256((own / "samples.npy").read_bytes()).hexdigest()
    (own / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"the index or its samples\.npy is damaged"):
        read_index(own / "index.json")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    members = [("a.png", picture(1)), ("a.txt", b"one"), ("a.pyd", pickle.dumps(Bomb())), ("a.pth", b"x")]
    write_tar(foreign / "x.tar", members)
    index_shards(foreign)
    assert len(next(batches(foreign, batch_size=1).iterate(0, 1))) == 1
    assert not Path("unpickled-by-fastmat").exists()


def test_the_library_s_shards_are_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "cc-%05d.tar"), maxcount=3, verbose=0) as sink:
        for row in range(8):
            sample = {"__key__": f"part{row // 4}/{row:04d}", "cls": row}
            if row % 2:
                sample |= {"png": Image.new("RGB", (9, 11), (row, 255 - row, 7)), "txt": f"a caption of {row}"}
            else:
                sample |= {"png": picture(row), "json": {"caption": f"a caption of {row}", "url": "x"}}
            sink.write(sample)
    index = index_shards(tmp_path)
    assert [shard.samples for shard in index.shards] == [3, 3, 2]
    batch = next(batches(tmp_path, batch_size=8, captions_per_image=1).iterate(0, 1))
    assert sorted(batch.index.tolist()) == sorted(batch.group.tolist()) == list(range(8))
    assert batch.texts == tuple(f"a caption of {row}" for row in batch.index.tolist())
    assert torch.equal((batch.images[:, 0, 4, 4] * 255).round().long(), batch.index)


def test_the_library_reads_ours(packed: Path, pictures: RetrievalSet) -> None:
    webdataset = pytest.importorskip("webdataset")
    paths = [str(path) for path in sorted(packed.glob("*.tar"))]
    found = list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in found] == [f"{row:09d}" for row in range(N)]
    for row, sample in enumerate(found):
        assert tuple(sample["json"]["captions"]) == pictures.captions[row]
        assert sample["json"]["image_id"] == pictures.ids[row]
        assert sample["png"].tobytes() == pictures.load(row).tobytes()


def test_what_others_put_in_a_shard(tmp_path: Path) -> None:
    """img2dataset's two text members, several captions, groups, upper case, JPEG, what macOS leaves."""
    directory = tarfile.TarInfo("pictures")
    directory.type = tarfile.DIRTYPE
    about = json.dumps({"url": "x", "status": "success", "group": 9}).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(directory)
        for name, data in [
            ("pictures/._000.jpg", b"resource fork"),
            ("pictures/000.jpg", picture(0, "JPEG")),
            ("pictures/000.txt", "\ufeffone dog\n\n  two Dogs!  \n".encode()),
            ("pictures/000.json", about),
            ("pictures/001.PNG", picture(1)),
            ("pictures/001.json", json.dumps({"captions": ["A cat.", "Cats!"], "group": "pets"}).encode()),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    members = [("002.webp", picture(2, "WEBP")), ("002.json", b'{"caption": "a T-shirt", "group": "pets"}')]
    write_tar(tmp_path / "b.tar", [("readme", b"no sample"), *members])
    write_tar(tmp_path / "c.tar", [])
    assert [shard.samples for shard in index_shards(tmp_path).shards] == [2, 1, 0]
    dataset = open_shards(index=tmp_path, captions="albef")
    batch = next(ShardBatches(dataset, TRANSFORM, batch_size=3, captions_per_image=5, seed=0).iterate(0, 1))
    texts = {row: set() for row in range(3)}
    for text, place in zip(batch.texts, batch.txt2img.tolist(), strict=True):
        texts[int(batch.index[place])].add(text)
    assert texts == {0: {"one dog", "two dogs"}, 1: {"a cat", "cats"}, 2: {"a t shirt"}}
    group = dict(zip(batch.index.tolist(), batch.group.tolist(), strict=True))
    assert group[1] == group[2] != group[0]


GOOD = [("a.png", picture(1)), ("a.txt", b"one")]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("/etc/a.png", picture(1))], r"the name '/etc/a\.png' leads out of the folder"),
        ([*GOOD, ("x/../../b.png", picture(1))], r"'x/\.\./\.\./b\.png' leads out of the folder"),
        ([("..\\b.png", picture(1))], r"leads out of the folder"),
        ([("a.txt", b"one")], r"x\.tar, sample 'a': expected one picture \(\.jpg, .*\), got \.txt$"),
        ([*GOOD, ("a.jpg", picture(1, "JPEG"))], r"expected one picture"),
        ([*GOOD, ("a.png", picture(2))], r"two members \.png; give every sample its own key"),
        ([("a.png", picture(1))], r"there is no caption; expected a \.json or a \.txt"),
        ([("a.png", picture(1)), ("a.json", b'{"url": "x"}')], r"sample 'a': key 'caption' is missing"),
        ([("a.png", picture(1)), ("a.json", b'{"caption": "  "}')], r"sample 'a': empty caption"),
        ([("a.png", picture(1)), ("a.json", b'{"captions": [3]}')], r"every caption must be a string, got 3"),
        ([("a.png", picture(1)), ("a.json", b"[1]")], r"its \.json holds a list, not an object"),
        ([("a.png", picture(1)), ("a.json", b"{")], r"its \.json is not JSON"),
        ([("a.png", picture(1)), ("a.json", b"[" * 10**6)], r"its \.json is not JSON"),
        ([("a.png", picture(1)), ("a.txt", b"\xff")], r"its text is not UTF-8"),
        ([("a.png", picture(1)), ("a.txt", b" \n")], r"the image has no caption"),
        ([], r"there is no sample in the 1 shards of"),
    ],
)
def test_a_shard_that_cannot_be_used(tmp_path: Path, members: list, message: str) -> None:
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=message):
        index_shards(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("b.png")
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(info)
    with pytest.raises(UserError, match=r"'b\.png' is no plain file; this shard is not to be trusted"):
        index_shards(tmp_path)


def test_damage_is_found_when_an_index_is_made(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", [*GOOD, ("b.png", picture(2)), ("b.txt", b"two")])
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        header = tar.getmember("b.png").offset
    flip(shard, header + 3)  # tarfile alone would say that the archive ends here
    with pytest.raises(UserError, match=rf"x\.tar: damaged after byte {header}"):
        index_shards(tmp_path)
    shard.write_bytes(whole[: header + 600])
    with pytest.raises(UserError, match=r"x\.tar: not a whole uncompressed tar file"):
        index_shards(tmp_path)
    shard.write_bytes(b"no archive at all" * 100)
    with pytest.raises(UserError, match=r"x\.tar: not a whole uncompressed tar file"):
        index_shards(tmp_path)


def test_folders_that_hold_no_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no shard in .*: shards are named \*\.tar"):
        index_shards(tmp_path)
    (tmp_path / "x.tar.gz").touch()
    with pytest.raises(UserError, match=r"x\.tar\.gz is compressed, unpack it to \.tar"):
        index_shards(tmp_path)
    with pytest.raises(UserError, match="is no folder of shards"):
        index_shards(tmp_path / "absent")
    with pytest.raises(UserError, match=r"there is no such index; `fastmat pack --index"):
        open_shards(index=tmp_path / "index.json")


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", picture(1, "JPEG")[:-60]), ("a.txt", b"one")])
    index_shards(tmp_path)
    with pytest.raises(UserError, match=r"x\.tar, sample 1: cannot be decoded"):
        next(batches(tmp_path, batch_size=1).iterate(0, 1))


def test_an_index_cannot_name_files_elsewhere(own: Path) -> None:
    index = json.loads((own / "index.json").read_text())
    os.rename(own / index["shards"][0]["file"], own.parent / "outside.tar")
    index["shards"][0]["file"] = "../outside.tar"
    (own / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is damaged"):
        open_shards(index=own)


def test_bad_arguments(packed: Path) -> None:
    with pytest.raises(UserError, match="batch_size 24 is more than the 23 images in the shards"):
        batches(packed, batch_size=24)
    for key, value in {"batch_size": 0, "captions_per_image": 0, "seed": -1, "workers": -1}.items():
        with pytest.raises(UserError, match=rf"{key} must be at least \d, got {value}"):
            batches(packed, **{key: value})
    with pytest.raises(UserError, match="shuffle_buffer must be at least 1"):
        batches(packed, buffer=0)
    with pytest.raises(UserError, match="batch of 4 images cannot be divided among 3 processes"):
        batches(packed).iterate(0, 1, rank=0, world=3)
