import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastmat.data.provenance import Provenance
from fastmat.data.retrieval import RetrievalSet, read_retrieval_set
from fastmat.errors import UserError


def read(folder: Path, rows: Any, *, captions: str = "none", files: str = "abc") -> RetrievalSet:
    """A set of `rows`, with pictures a.png, b.png, c.png whose red channel is 0, 1, 2."""
    for value, name in enumerate(files):
        Image.new("RGB", (2, 2), (value, 0, 0)).save(folder / f"{name}.png")
    path = folder / "set.json"
    path.write_bytes(rows if isinstance(rows, bytes) else json.dumps(rows).encode())
    return read_retrieval_set(path, folder, name="tiny", split="test", captions=captions)  # type: ignore[arg-type]


def row(image: str, caption: Any = "a dog", **more: Any) -> dict[str, Any]:
    return {"image": f"{image}.png", "caption": caption, **more}


def test_ragged_captions_in_the_order_of_the_file(tmp_path: Path) -> None:
    seven = [f"caption {i}" for i in range(7)]
    found = read(tmp_path, [row("b", seven), row("a", " One, as it stands. "), row("c", ["x", "y"])])
    assert found.captions == (tuple(seven), (" One, as it stands. ",), ("x", "y"))
    assert found.ids == ("b.png", "a.png", "c.png")
    assert found.group == (0, 1, 2)
    assert (found.n_images, found.n_captions) == (3, 10)
    assert [found.load(i).getpixel((0, 0)) for i in range(3)] == [(1, 0, 0), (0, 0, 0), (2, 0, 0)]


def test_rows_of_one_image_merge(tmp_path: Path) -> None:
    rows = [row("a", "1", image_id=7), row("b", "2", image_id=8), row("a", "3", image_id=7)]
    found = read(tmp_path, rows)
    assert found.captions == (("1", "3"), ("2",))
    assert found.ids == ("7", "8")


def test_groups_join_images(tmp_path: Path) -> None:
    found = read(tmp_path, [row("a", group="s"), row("b"), row("c", group="s")])
    assert found.group == (0, 1, 0)


def test_a_group_named_like_an_image_stays_apart(tmp_path: Path) -> None:
    assert read(tmp_path, [row("a", group="b.png"), row("b")]).group == (0, 1)


def test_preprocessing_is_applied(tmp_path: Path) -> None:
    assert read(tmp_path, [row("a", "A Dog.")], captions="albef").captions == (("a dog",),)


def test_take_and_fingerprint(tmp_path: Path) -> None:
    rows = [row("a"), row("b"), row("c")]
    found = read(tmp_path, rows)
    assert found.take(2).ids == ("a.png", "b.png")
    assert found.take(2).load(1).getpixel((0, 0)) == (1, 0, 0)
    assert found.fingerprint() == read(tmp_path, rows).fingerprint()
    others = [rows[:2], [row("a", "a cat"), *rows[1:]], [row("a", group=1), row("b", group=1), row("c")]]
    others.append([row("a", image_id=1), *rows[1:]])
    assert len({found.fingerprint(), *(read(tmp_path, other).fingerprint() for other in others)}) == 5
    for n in (0, 4):
        with pytest.raises(UserError, match=f"tiny/test has 3 images, cannot take {n}"):
            found.take(n)


def test_the_loader_can_be_sent_to_a_worker(tmp_path: Path) -> None:
    load = pickle.loads(pickle.dumps(read(tmp_path, [row("a")]).load))
    assert load(0).size == (2, 2)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbf" + json.dumps([row("a")]).encode()).n_images == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"images": [], "annotations": []}, "expected a list .* got an object with the keys images, annotations"),
        (3, "expected a list .* got int"),
        ([], "the list is empty"),
        (b'[{"image": "a.png",\n"caption": "caf\xe9"}]', r"byte 35 \(line 2\) is not UTF-8"),
        (b'[\n{"image": "a.png" "caption": "x"}]', "not JSON at line 2, column 19"),
        (b"[" * 100_000, "nested too deeply"),
        (["a.png"], "row 1: expected an object with 'image' and 'caption', got str"),
        ([row("a"), {"imgae": "b.png", "caption": "x"}], "row 2: key 'image' is missing; rename 'imgae' to 'image'"),
        ([{"image": "a.png", "text": "x"}], "row 1: key 'caption' is missing; the row has: image, text"),
        ([row("a"), row("b", " ")], "row 2: empty caption"),
        ([row("a", ["x", ""])], "row 1: empty caption"),
        ([row("a"), row("b", [])], "row 2: the image has no caption"),
        ([row("a", 3)], "row 1: 'caption' must be a string or a list of strings, got 3"),
        ([row("a", ["x", None])], "row 1: every caption must be a string, got None"),
        ([row("a", "\ud800")], "row 1: 'caption' .* holds half a surrogate pair"),
        ([row("a", image_id="\ud800")], "row 1: 'image_id' .* holds half a surrogate pair"),
        ([row("a", group="\ud800")], "row 1: 'group' .* holds half a surrogate pair"),
        ([row("\ud800")], "row 1: 'image' .* holds half a surrogate pair"),
        (b"[" + b"1" * 5000 + b"]", "a number in it has too many digits"),
        ([{"image": 3, "caption": "x"}], "row 1: 'image' must be a string that is not empty, got 3"),
        ([row("a", image_id=1.5)], "row 1: 'image_id' must be a string or a whole number, got 1.5"),
        ([row("a", image_id=1), row("b"), row("c", image_id=1)], r"row 3: image_id 1 already names 'a\.png' in row 1"),
        ([row("a", image_id=1), row("a", image_id=2)], r"row 2: image 'a\.png' has image_id 2 here, but 1 in row 1"),
        ([row("a", group=1), row("a", group=2)], r"row 2: image 'a\.png' is in group 2 here, but not in row 1"),
        ([row("a"), row("x"), row("b"), row("y")], r"row 2: image file .*x\.png is missing \(2 of 4 are\)"),
    ],
)
def test_bad_annotations_name_file_and_row(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, rows)
    assert str(caught.value).startswith(str(tmp_path / "set.json"))
    assert "\n" not in str(caught.value)


def test_a_caption_that_preprocessing_empties_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 2: nothing of caption '\(!\)' is left by pre-processing 'blip'"):
        read(tmp_path, [row("a"), row("b", "(!)")], captions="blip")


def test_missing_annotation_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such annotation file"):
        read_retrieval_set(tmp_path / "none.json", tmp_path, name="tiny", split="test")
    with pytest.raises(UserError, match="cannot be read"):
        read_retrieval_set(tmp_path, tmp_path, name="tiny", split="test")


def test_a_picture_that_goes_bad_names_its_row(tmp_path: Path) -> None:
    found = read(tmp_path, [row("a"), row("b")])
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"set\.json, row 2: .*b\.png: not a picture"):
        found.load(1)


def test_provenance_of_generated_captions_survives_reading(tmp_path: Path) -> None:
    made = {"generator": "eda", "model": "lexicon 12ab", "source": "a dog", "seed": 3}
    rows = [row("a"), row("b", ["x", "y"], generator="human"), row("a", "a hound", **made)]
    found = read(tmp_path, rows)
    eda = Provenance(**made)
    assert found.captions == (("a dog", "a hound"), ("x", "y"))
    assert found.provenance == ((None, eda), (None, None))
    assert found.take(1).provenance == ((None, eda),)
    assert eda.row() == {**made, "made": "caption"}
    plain = read(tmp_path, [{key: value for key, value in one.items() if key not in made} for one in rows])
    assert plain.provenance == () and plain.fingerprint() == found.fingerprint()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"generator": 3}, "'generator' must be a string"),
        ({"generator": ""}, "'generator' must be a string that says something"),
        ({"generator": "eda", "seed": "0"}, "'seed' must be a whole number"),
        ({"generator": "eda", "source": ["a"]}, "'source' must be a string"),
        ({"generator": "eda", "made": "imago"}, "'made' is 'imago'; did you mean 'image'"),
    ],
)
def test_odd_provenance_is_refused(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"row 2: {said}"):
        read(tmp_path, [row("a"), row("b", **more)])
