"""Every set as torchvision lays it out, written small: labels, names, pictures; what is refused, and pickles."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from fastmat.data.labelled import class_prompts
from fastmat.data.torchvision_sets import KINDS, arrays, torchvision_set
from fastmat.errors import UserError

Patch = pytest.MonkeyPatch
# What every written set holds, in its own order: class 0 twice, class 1 once; pictures of one grey each.
GREYS = [10, 200, 30]
LABELS = [0, 1, 0]


def picture(file: Path, grey: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (grey,) * 3).save(file, quality=100)


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def cifar(root: Path, patch: Patch, *, reader: str, folder: str, key: str, names_key: str, meta: str) -> None:
    (root / folder).mkdir(parents=True)
    data = np.repeat(np.array(GREYS, dtype=np.uint8)[:, None], 3072, axis=1)
    files = {
        "test_batch": {"data": data, key: LABELS},
        "train_batch": {"data": data[:1], key: LABELS[:1]},
        meta: {names_key: ["big_cat", "dog"]},
    }
    for name, content in files.items():
        (root / folder / name).write_bytes(pickle.dumps(content))
    cls = getattr(datasets, reader)
    patch.setattr(cls, "test_list", [["test_batch", md5(root / folder / "test_batch")]])
    patch.setattr(cls, "train_list", [["train_batch", md5(root / folder / "train_batch")]])
    patch.setattr(cls, "meta", {"filename": meta, "key": names_key, "md5": md5(root / folder / meta)})


def cifar10(root: Path, patch: Patch) -> None:
    names = {"key": "labels", "names_key": "label_names", "meta": "batches.meta"}
    cifar(root, patch, reader="CIFAR10", folder="cifar-10-batches-py", **names)


def cifar100(root: Path, patch: Patch) -> None:
    names = {"key": "fine_labels", "names_key": "fine_label_names", "meta": "meta"}
    cifar(root, patch, reader="CIFAR100", folder="cifar-100-python", **names)


def stl10(root: Path, patch: Patch) -> None:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        grey = np.array(GREYS, dtype=np.uint8)
        (folder / f"{split}_X.bin").write_bytes(np.repeat(grey, 3 * 96 * 96).tobytes())
        (folder / f"{split}_y.bin").write_bytes(np.array([label + 1 for label in LABELS], dtype=np.uint8).tobytes())
    (folder / "class_names.txt").write_text("big_cat\ndog\n")
    for which in ("train", "test"):
        names = [f"{which}_X.bin", f"{which}_y.bin"]
        patch.setattr(datasets.STL10, f"{which}_list", [[name, md5(folder / name)] for name in names])


def svhn(root: Path, patch: Patch) -> None:
    root.mkdir(parents=True)
    grey = np.broadcast_to(np.array(GREYS, dtype=np.uint8), (32, 32, 3, 3))  # [H, W, 3, N]
    savemat(root / "test_32x32.mat", {"X": grey, "y": np.array([[10], [1], [10]], dtype=np.uint8)})
    lists = {"test": ["", "test_32x32.mat", md5(root / "test_32x32.mat")]}
    patch.setattr(datasets.SVHN, "split_list", lists)


def flowers102(root: Path, patch: Patch) -> None:
    folder = root / "flowers-102"
    for i, grey in enumerate(GREYS, start=1):
        picture(folder / "jpg" / f"image_{i:05d}.jpg", grey)
    savemat(folder / "imagelabels.mat", {"labels": np.array([label + 1 for label in LABELS])})
    savemat(folder / "setid.mat", {"tstid": np.array([1, 2, 3]), "trnid": np.array([1]), "valid": np.array([2])})
    files = {"label": "imagelabels.mat", "setid": "setid.mat"}
    patch.setattr(datasets.Flowers102, "_file_dict", {key: (name, md5(folder / name)) for key, name in files.items()})
    patch.setattr(datasets.Flowers102, "classes", ["big_cat", "dog"])


def stanford_cars(root: Path, patch: Patch) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    for i, grey in enumerate(GREYS):
        picture(folder / "cars_test" / f"{i}.jpg", grey)
    rows = np.array([(f"{i}.jpg", label + 1) for i, label in enumerate(LABELS)], dtype=[("fname", "O"), ("class", "O")])
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": rows})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(["big_cat", "dog"], dtype=object)})


def food101(root: Path, patch: Patch) -> None:
    folder = root / "food-101"
    paths = [("big_cat", "1"), ("dog", "2"), ("big_cat", "3")]
    for (name, number), grey in zip(paths, GREYS, strict=True):
        picture(folder / "images" / name / f"{number}.jpg", grey)
    (folder / "meta").mkdir()
    (folder / "meta" / "test.json").write_text(json.dumps({"dog": ["dog/2"], "big_cat": ["big_cat/1", "big_cat/3"]}))


def dtd(root: Path, patch: Patch) -> None:
    folder = root / "dtd" / "dtd"
    lines = ["big_cat/big_1.jpg", "dog/dog_2.jpg", "big_cat/big_3.jpg"]
    for line, grey in zip(lines, GREYS, strict=True):
        picture(folder / "images" / line, grey)
    (folder / "labels").mkdir()
    (folder / "labels" / "test1.txt").write_text("\n".join(lines))


def eurosat(root: Path, patch: Patch) -> None:
    for name, grey in zip(["BigCat/1.jpg", "Dog/2.jpg", "BigCat/3.jpg"], GREYS, strict=True):
        picture(root / "eurosat" / "2750" / name, grey)


def sun397(root: Path, patch: Patch) -> None:
    for name, grey in zip(["b/big_cat/sun_1.jpg", "d/dog/in/sun_2.jpg", "b/big_cat/sun_3.jpg"], GREYS, strict=True):
        picture(root / "SUN397" / name, grey)
    (root / "SUN397" / "ClassName.txt").write_text("/b/big_cat\n/d/dog/in\n")


def fgvc_aircraft(root: Path, patch: Patch) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    for i, grey in enumerate(GREYS):
        picture(folder / "images" / f"{i}.jpg", grey)
    (folder / "variants.txt").write_text("big_cat\ndog\n")
    (folder / "images_variant_test.txt").write_text("0 big_cat\n1 dog\n2 big_cat\n")


def oxford_pets(root: Path, patch: Patch) -> None:
    folder = root / "oxford-iiit-pet"
    lines = ["big_cat_1 1 1 1", "dog_2 2 2 1", "big_cat_3 1 1 2"]
    for line, grey in zip(lines, GREYS, strict=True):
        picture(folder / "images" / f"{line.split()[0]}.jpg", grey)
    (folder / "annotations").mkdir()
    (folder / "annotations" / "test.txt").write_text("\n".join(lines))


def caltech101(root: Path, patch: Patch) -> None:
    folder = root / "caltech101" / "101_ObjectCategories"
    for name, grey in zip(["big_cat/image_0001", "dog/image_0001", "big_cat/image_0002"], GREYS, strict=True):
        picture(folder / f"{name}.jpg", grey)
    picture(folder / "BACKGROUND_Google" / "image_0001.jpg", 0)


WRITERS: dict[str, Callable[[Path, Patch], None]] = {
    "caltech101": caltech101,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "dtd": dtd,
    "eurosat": eurosat,
    "fgvc_aircraft": fgvc_aircraft,
    "flowers102": flowers102,
    "food101": food101,
    "oxford_pets": oxford_pets,
    "stanford_cars": stanford_cars,
    "stl10": stl10,
    "sun397": sun397,
    "svhn": svhn,
}
SPOKEN = {
    "eurosat": ("Big Cat", "Dog"),
    "oxford_pets": ("Big Cat", "Dog"),
    "sun397": ("big cat", "dog in"),
    "svhn": ("0", "1"),
}


def test_every_set_is_written_here() -> None:
    assert set(WRITERS) == set(KINDS)


@pytest.mark.parametrize("which", WRITERS)
def test_a_set_as_torchvision_lays_it_out(which: str, tmp_path: Path, monkeypatch: Patch) -> None:
    WRITERS[which](tmp_path / "root", monkeypatch)
    split = "all" if "all" in KINDS[which].splits else "test"
    dataset = torchvision_set(which=which, root=tmp_path / "root", split=split)
    first, second = SPOKEN.get(which, ("big cat", "dog"))
    prompts = ((f"This is a photo of a {first}",), (f"This is a photo of a {second}",))
    assert class_prompts(dataset) == prompts
    assert dataset.group == (0, 1, 0) and (dataset.name, dataset.split) == (which, split)
    assert dataset.captions == (prompts[0], prompts[1], prompts[0])
    load = pickle.loads(pickle.dumps(dataset.load))  # as worker processes get it
    assert [load(row).getpixel((3, 3)) for row in range(3)] == [(grey,) * 3 for grey in (10, 200, 30)]
    assert len(set(dataset.ids)) == 3 and not any(Path(name).is_absolute() for name in dataset.ids)


def test_names_templates_and_the_other_split(tmp_path: Path, monkeypatch: Patch) -> None:
    cifar10(tmp_path / "root", monkeypatch)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"big_cat": "lion", "dog": "hound"}))
    dataset = torchvision_set(
        which="cifar10", root=tmp_path / "root", split="train", names=names, templates=("a {}", "the {}")
    )
    assert dataset.captions == (("a lion", "the lion"),)
    names.write_text(json.dumps({"dog": "hound"}))
    with pytest.raises(UserError, match=r"names\.json: class 'big_cat' has no name there"):
        torchvision_set(which="cifar10", root=tmp_path / "root", names=names)


@pytest.mark.parametrize("which", sorted(set(KINDS) - {"svhn"}))
def test_a_set_that_is_not_there_is_one_sentence(which: str, tmp_path: Path) -> None:
    split = next(iter(KINDS[which].splits))
    with pytest.raises(UserError, match=f"there is no '{KINDS[which].place}' in it") as caught:
        torchvision_set(which=which, root=tmp_path, split=split)
    assert len(str(caught.value).splitlines()) == 1 and "download=True" not in str(caught.value)
    assert not list(tmp_path.iterdir())  # torchvision's Caltech101 would have made a folder


def test_files_that_are_missing_or_damaged(tmp_path: Path, monkeypatch: Patch) -> None:
    with pytest.raises(UserError, match=r"torchvision's SVHN cannot read .* \(Dataset not found or corrupted\); fetch"):
        torchvision_set(which="svhn", root=tmp_path)
    dtd(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="dtd has no split 'dev': choose one of train, val, test"):
        torchvision_set(which="dtd", root=tmp_path, split="dev")
    with pytest.raises(UserError, match=r"torchvision's DTD cannot read .*train1\.txt"):
        torchvision_set(which="dtd", root=tmp_path, split="train")
    (tmp_path / "dtd/dtd/images/dog/dog_2.jpg").unlink()
    with pytest.raises(UserError, match=r"dog_2\.jpg is missing \(1 of 3 are\)"):
        torchvision_set(which="dtd", root=tmp_path)
    with pytest.raises(UserError, match="'cifar' is not known here; did you mean 'cifar10'"):
        torchvision_set(which="cifar", root=tmp_path)


class Harm:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("file", ["test_batch", "train_batch", "batches.meta"])
def test_a_pickle_that_is_not_the_published_one_is_never_opened(file: str, tmp_path: Path, monkeypatch: Patch) -> None:
    cifar10(tmp_path, monkeypatch)
    harm = pickle.dumps(Harm(tmp_path / "trace"))
    pickle.loads(harm)
    assert (tmp_path / "trace").exists()  # it does work
    (tmp_path / "trace").unlink()
    (tmp_path / "cifar-10-batches-py" / file).write_bytes(harm)
    for split in ("train", "test"):
        with pytest.raises(UserError, match="not found or corrupted"):
            torchvision_set(which="cifar10", root=tmp_path, split=split)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1)])
def test_pictures_in_memory_stand_upright_in_their_colours(axes: tuple[int, ...]) -> None:
    """[N, 3, H, W] as STL10 and SVHN have it, [N, H, W, 3] as CIFAR does."""
    planes = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7), dtype=np.uint8)
    dataset = SimpleNamespace(data=planes.transpose(axes), labels=[1, 0], classes=["a", "b"])
    found = arrays(dataset, Path())
    image = found.load(1)
    assert image.size == (7, 5)
    assert image.getpixel((6, 2)) == tuple(planes[1, :, 2, 6].tolist())
