"""Labelled sets: a folder of classes, the built-in labels, and which captions are labels."""

import json

import pytest
from PIL import Image

from fastmat.data.digits import digits_labels, digits_set
from fastmat.data.labelled import class_prompts, image_folder, labelled_digits
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Three classes of 3, 1 and 2 pictures, each of its own grey; something else lies around too."""
    for c, (name, count) in enumerate([("big_cat", 3), ("dog", 1), ("tree", 2)]):
        (tmp_path / name / "more").mkdir(parents=True)
        for i in range(count):
            where = tmp_path / name / ("more" if i == 2 else ".")
            Image.new("RGB", (4, 4), (c * 10 + i,) * 3).save(where / f"{i}.png")
    (tmp_path / "dog" / "notes.txt").write_text("no picture")
    (tmp_path / "readme.md").write_text("no class")
    return tmp_path


def read(folder, **arguments):
    return image_folder(folder, title="animals", split="train", **arguments)


def test_classes_take_turns_and_share_their_prompt(folder):
    dataset = read(folder)
    assert dataset.ids == (
        "big_cat/0.png",
        "dog/0.png",
        "tree/0.png",
        "big_cat/1.png",
        "tree/1.png",
        "big_cat/more/2.png",
    )
    assert dataset.group == (0, 1, 2, 0, 2, 0)
    assert dataset.captions[1] == ("This is a photo of a dog",)
    assert dataset.captions[0] == dataset.captions[5] == ("This is a photo of a big cat",)
    assert [dataset.load(row).getpixel((0, 0))[0] for row in range(6)] == [0, 10, 20, 1, 21, 2]
    assert (dataset.name, dataset.split) == ("animals", "train")
    assert class_prompts(dataset) == (
        ("This is a photo of a big cat",),
        ("This is a photo of a dog",),
        ("This is a photo of a tree",),
    )


def test_names_and_templates_can_be_given(folder, tmp_path):
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"big_cat": "lion", "dog": "hound", "tree": "oak", "fish": "cod"}))
    dataset = read(folder, names=names, templates=("a {}", "the {}!"))
    assert class_prompts(dataset) == (("a lion", "the lion!"), ("a hound", "the hound!"), ("a oak", "the oak!"))
    assert dataset.captions[1] == ("a hound", "the hound!")


def test_what_is_wrong_with_a_folder(folder, tmp_path):
    names = tmp_path / "names.json"
    with pytest.raises(UserError, match="no such folder of classes"):
        read(folder / "missing")
    with pytest.raises(UserError, match="two classes or more, found 1"):
        read(folder / "dog")
    with pytest.raises(UserError, match="the file of class names cannot be read"):
        read(folder, names=names)
    names.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read(folder, names=names)
    names.write_text('{"dog": "hound", "tree": "oak"}')
    with pytest.raises(UserError, match=r"class 'big_cat' has no name there \(1 have none\)"):
        read(folder, names=names)
    names.write_text('{"dog": "oak", "tree": "oak", "big_cat": "lion"}')
    with pytest.raises(UserError, match="two classes are called 'oak'"):
        read(folder, names=names)
    names.write_text('["dog"]')
    with pytest.raises(UserError, match="class folder"):
        read(folder, names=names)
    with pytest.raises(UserError, match=r"each must hold \{\} once.*'a dog'"):
        read(folder, templates=("a dog",))
    with pytest.raises(UserError, match="give at least one"):
        read(folder, templates=())
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty: the class has no pictures"):
        read(folder)


@pytest.mark.parametrize(
    ("label", "classes", "said"), [("digit", 10, "three"), ("colour", 8, "red digit"), ("object", 80, "red three")]
)
def test_built_in_labels_are_those_of_the_first_object(label, classes, said):
    dataset = labelled_digits("train", label=label)
    prompts = class_prompts(dataset)
    assert prompts is not None and len(prompts) == classes
    assert (f"a picture of a {said}",) in prompts
    scenes, described = digits_set("train"), digits_labels("train")
    assert dataset.ids == scenes.ids
    for row in (0, 5, 4000):
        words = dataset.captions[row][0].split(" ")[4:]
        digit, colour = described[row].first_digit, described[row].first_colour
        assert words == {"digit": [digit], "colour": [colour, "digit"], "object": [colour, digit]}[label]
        assert dataset.captions[row] == prompts[dataset.group[row]]
        assert dataset.load(row).tobytes() == scenes.load(row).tobytes()


def test_another_label_is_refused():
    with pytest.raises(UserError, match="no label 'digits'; did you mean 'digit'"):
        labelled_digits("val", label="digits")


@pytest.mark.parametrize(
    ("captions", "group", "labels"),
    [
        ([("a",), ("b",), ("a",)], [3, 1, 3], (("b",), ("a",))),
        ([("a",), ("b",), ("c",)], [0, 1, 2], None),  # an image of its own each
        ([("a",), ("b",), ("c",)], [0, 1, 0], None),  # one class, two captions
        ([("a",), ("a",), ("a",)], [0, 1, 0], None),  # one caption, two classes
    ],
)
def test_captions_are_labels_where_a_class_is_told_by_its_text(captions, group, labels):
    dataset = RetrievalSet(
        name="some",
        split="train",
        captions=tuple(captions),
        ids=tuple(str(i) for i in range(len(group))),
        group=tuple(group),
        load=lambda row: Image.new("RGB", (1, 1)),
    )
    assert class_prompts(dataset) == labels
