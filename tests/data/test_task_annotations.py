"""Public annotation files of the tasks: what is read, and one sentence for what cannot be."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from annotated import SIZES, write_coco_captions, write_refcoco, write_snli_ve

from fastmat.data.annotations import read_plain_pickle
from fastmat.data.coco_captions import read_coco_captions
from fastmat.data.entailment import read_entailment_set
from fastmat.data.grounding import GroundingSet, read_grounding_set
from fastmat.errors import UserError


def grounding(arguments: dict[str, Any]) -> GroundingSet:
    paths = {key: Path(value) for key, value in arguments.items() if key != "annotations"}
    return read_grounding_set(tuple(map(Path, arguments["annotations"])), **paths, name="refcoco+")


@pytest.mark.parametrize("json_refs", [False, True])
def test_refcoco(json_refs: bool, tmp_path: Path) -> None:
    found = grounding(write_refcoco(tmp_path, json_refs=json_refs))
    assert (found.pairs.n_images, found.pairs.split) == (16, "val+testA+testB")
    assert found.pairs.captions[0] == ("the a red dog runs left",)  # as ALBEF pre-processes
    assert found.pairs.ids[:3] == ("0/0", "0/1", "1/0") and len(set(found.pairs.ids)) == 16
    assert found.picture.tolist() == list(found.pairs.group) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert found.part == ("val",) * 8 + ("testA",) * 4 + ("testB",) * 4
    assert [found.size[row] for row in (0, 8, 12, 4)] == SIZES
    assert found.boxes[0].shape == (5, 4)
    torch.testing.assert_close(found.target[0], found.boxes[0][0] + 0.5)
    height, width = found.size[8]
    assert found.pairs.load(8).size == (width, height)


class Code:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("run",)


def test_a_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "refs.p").write_bytes(pickle.dumps([Code()]))
    with pytest.raises(UserError, match=r"it names builtins\.print.*carries code, which is never run"):
        read_plain_pickle(tmp_path / "refs.p", what="refs")
    assert capsys.readouterr().out == ""
    (tmp_path / "refs.p").write_bytes(b"\x80")
    with pytest.raises(UserError, match="it is damaged or carries code"):
        read_plain_pickle(tmp_path / "refs.p", what="refs")
    # As Python 2 wrote them.
    (tmp_path / "refs.p").write_bytes(b"(lp0\n(dp1\nS'split'\np2\nS'val'\np3\nsS'ref_id'\np4\nI7\nsa.")
    assert read_plain_pickle(tmp_path / "refs.p", what="refs") == [{"split": "val", "ref_id": 7}]


def change(path: str, edit: Callable[[Any], Any]) -> None:
    content = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(edit(content)))


def test_a_picture_in_which_nothing_was_detected(tmp_path: Path) -> None:
    arguments: dict[str, Any] = write_refcoco(tmp_path)
    change(arguments["detections"], lambda c: {**c, "100": []})
    assert [len(boxes) for boxes in grounding(arguments).boxes[:5]] == [0, 0, 0, 0, 5]


@pytest.mark.parametrize(
    ("file", "edit", "said"),
    [
        (
            "detections",
            lambda c: {k: v for k, v in c.items() if k != "100"},
            r"row 1: .*dets.json has no boxes for image",
        ),
        (
            "detections",
            lambda c: {**c, "100": [[1, 2, 0, 3]]},
            r"a box of .* must be \[x, y, width, height\] with a pos",
        ),
        ("detections", lambda c: {**c, "100": ["box"]}, r"a box of .* must be \[x, y, width, height\]"),
        ("instances", lambda c: {**c, "annotations": c["annotations"][1:]}, "annotation 1000 is not in"),
        ("instances", lambda c: {"images": c["images"]}, "key 'annotations' is missing"),
        ("instances", lambda c: {**c, "images": c["images"][1:]}, "row 1: image 100 is not in"),
        ("refs", lambda c: c[1:], "row 1: ref_id 0 is not in .*take the files of one release"),
        ("refs", lambda c: {}, "expected a list of objects with 'ref_id', got dict"),
        ("annotations", lambda c: [{**c[0], "image": "no.jpg"}], "row 1: image file .*no.jpg is missing"),
        ("annotations", lambda c: [{**c[0], "text": "!!"}], "nothing of '!!' is left by pre-processing"),
        ("annotations", lambda c: [{"image": "x", "text": "y"}], "key 'ref_id' is missing; it has: image, text"),
        ("annotations", lambda c: [{**c[0], "ref_id": "0"}], "'ref_id' must be a whole number, got '0'"),
        ("annotations", lambda c: [], "that is not empty"),
    ],
)
def test_refcoco_that_cannot_be_read(file: str, edit: Callable[[Any], Any], said: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = write_refcoco(tmp_path, json_refs=True)
    change(arguments[file][0] if file == "annotations" else arguments[file], edit)
    with pytest.raises(UserError, match=said):
        grounding(arguments)


def test_snli_ve(tmp_path: Path) -> None:
    arguments = write_snli_ve(tmp_path)
    images = Path(arguments["images"])
    found = read_entailment_set(Path(arguments["annotations"]), images, name="snli-ve", split="test")
    assert found.pairs.n_images == 9 and found.label.tolist() == [2, 1, 0] * 3
    assert found.pairs.group == (0, 0, 0, 1, 1, 1, 2, 2, 2) and found.pairs.ids[4] == "1#1r1x"
    other = read_entailment_set(tmp_path / "ve_test.json", images, name="snli-ve", split="test")
    assert other.pairs.captions == found.pairs.captions and other.label.tolist() == found.label.tolist()
    assert len(set(other.pairs.ids)) == 9


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"neutral"', '"neutrl"', "jsonl, line 2: unknown label 'neutrl'; did you mean 'neutral'?"),
        ('"sentence2"', '"hypothesis"', "line 1: key 'sentence2' is missing"),
        ('"Flickr30K_ID": "1"', '"Flickr30K_ID": "7"', "line 4: image file .*7.jpg is missing .1 of 3 are"),
        ("}\n", "\n", "line 1: not JSON"),
    ],
)
def test_snli_ve_that_cannot_be_read(old: str, new: str, said: str, tmp_path: Path) -> None:
    file = Path(write_snli_ve(tmp_path)["annotations"])
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError, match=said):
        read_entailment_set(file, tmp_path / "images", name="snli-ve", split="test")


def test_coco_captions(tmp_path: Path) -> None:
    arguments = write_coco_captions(tmp_path)
    file, images = Path(arguments["annotations"]), Path(arguments["images"])
    found = read_coco_captions(file, images, name="coco", split="val")
    assert found.ids == ("0", "1", "2", "3", "4")  # the sixth has no caption
    assert found.captions[1] == ("the cat sits in the snow", "the black cat")
    rows = [{"image": "COCO_val2014_000000000003.jpg", "caption": ["one", "two"]}]
    (tmp_path / "karpathy.json").write_text(json.dumps(rows))
    assert read_coco_captions(tmp_path / "karpathy.json", images, name="c", split="v").captions == (("one", "two"),)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: {"images": c["images"]}, "key 'annotations' is missing; it has: images"),
        (lambda c: {**c, "images": c["images"][1:]}, "image 0 has a caption, but is not among its images"),
        (lambda c: {**c, "annotations": []}, "no image in it has a caption"),
        (lambda c: {**c, "annotations": [{"image_id": 0, "caption": ""}]}, "annotation 1: 'caption' must be a string"),
        (lambda c: {**c, "annotations": [{"caption": "a"}]}, "annotation 1: key 'image_id' is missing"),
        (lambda c: {**c, "images": [{"id": 0}]}, "image 1: key 'file_name' is missing"),
        (lambda c: 3, "expected an object with 'annotations', got int"),
    ],
)
def test_coco_captions_that_cannot_be_read(edit: Callable[[Any], Any], said: str, tmp_path: Path) -> None:
    arguments = write_coco_captions(tmp_path)
    change(arguments["annotations"], edit)
    with pytest.raises(UserError, match=said):
        read_coco_captions(Path(arguments["annotations"]), tmp_path / "images", name="coco", split="val")
