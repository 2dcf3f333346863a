"""Augmented sets: rows and their provenance, read back like any other set, written whole or not at all."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image

from fastmat.augment.function import Function
from fastmat.augment.jsonl import JsonLines
from fastmat.augment.offline import Generator, Request, Result, seed_of, write_augmented_set
from fastmat.data.provenance import Provenance
from fastmat.data.retrieval import RetrievalSet, read_retrieval_set
from fastmat.errors import UserError

ROWS = [
    {"image": "pictures/a.png", "image_id": "A", "caption": ["a red dog", "a dog runs"]},
    {"image": "pictures/b.png", "caption": "two cats", "group": "cats"},
    {"image": "pictures/c.png", "caption": ["two cats sit"], "group": "cats"},
]


class Fake:
    """Answers by a function of the request; remembers what it was asked."""

    name = "fake"
    model = "fake 1"

    def __init__(
        self,
        answer: Callable[[Request], Result],
        *,
        per: Literal["caption", "image"] = "caption",
        copies: int | None = None,
    ) -> None:
        self.answer = answer
        self.per: Literal["caption", "image"] = per
        self.copies = copies
        self.asked: list[list[Request]] = []

    def __call__(self, requests: Sequence[Request]) -> list[Result]:
        self.asked.append(list(requests))
        return [self.answer(request) for request in requests]


@pytest.fixture
def source(tmp_path: Path) -> RetrievalSet:
    (tmp_path / "pictures").mkdir()
    for value, name in enumerate("abc"):
        Image.new("RGB", (4, 2), (value, 0, 0)).save(tmp_path / "pictures" / f"{name}.png")
    (tmp_path / "train.json").write_text(json.dumps(ROWS))
    return read_retrieval_set(tmp_path / "train.json", tmp_path, name="tiny", split="train")


def read(folder: Path) -> RetrievalSet:
    return read_retrieval_set(folder / "augmented.json", folder, name="augmented", split="train")


def test_generated_captions_stand_after_the_human_ones_with_their_provenance(
    source: RetrievalSet, tmp_path: Path
) -> None:
    generator = Fake(lambda request: f"{request.caption},  again {request.copy}\n")
    written = write_augmented_set(source, generator, tmp_path / "sets" / "out", copies=2, seed=5)
    assert (written.captions, written.images, written.dropped) == (8, 0, 0)
    found = read(tmp_path / "sets" / "out")
    assert found.ids == source.ids == ("A", "pictures/b.png", "pictures/c.png")
    assert found.group == source.group == (0, 1, 1)
    assert found.captions[0] == (
        *("a red dog", "a dog runs"),
        *("a red dog, again 0", "a red dog, again 1", "a dog runs, again 0", "a dog runs, again 1"),
    )
    maker = {"generator": "fake", "model": "fake 1", "seed": 5}
    assert found.provenance[0][:3] == (None, None, Provenance(source="a red dog", **maker))  # type: ignore[arg-type]
    assert found.provenance[2] == (None, *[Provenance(source="two cats sit", **maker)] * 2)  # type: ignore[arg-type]
    assert [found.load(i).getpixel((0, 0)) for i in range(3)] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    rows = json.loads((tmp_path / "sets/out/augmented.json").read_text())
    assert rows[0] == {
        "image": "../../pictures/a.png",
        "image_id": "A",
        "group": "group 0",
        "caption": "a red dog",
        "generator": "human",
    }
    assert rows[-1]["source"] == "two cats sit" and rows[-1]["made"] == "caption"
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["out"]


def test_requests_carry_picture_copy_and_a_seed_of_their_own(source: RetrievalSet, tmp_path: Path) -> None:
    generator = Fake(lambda request: f"{request.seed}")
    write_augmented_set(source, generator, tmp_path / "out", copies=2, seed=5, batch_size=3)
    assert [len(asked) for asked in generator.asked] == [3, 3, 2]
    asked = [request for chunk in generator.asked for request in chunk]
    assert [(r.image_id, r.caption, r.copy) for r in asked[:4]] == [
        ("A", "a red dog", 0),
        ("A", "a red dog", 1),
        ("A", "a dog runs", 0),
        ("A", "a dog runs", 1),
    ]
    assert [request.load().getpixel((0, 0))[0] for request in asked] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert len({request.seed for request in asked}) == 8
    assert asked[1].seed == seed_of(5, "A", "a red dog", 1) and 0 <= asked[1].seed < 2**63
    again = Fake(lambda request: f"{request.seed}")
    write_augmented_set(source.take(1), again, tmp_path / "other", copies=1, seed=5, batch_size=99)
    assert again.asked[0][0].seed == asked[0].seed and again.asked[0][1].seed == asked[2].seed


def test_a_generator_per_image_is_asked_once_for_each(source: RetrievalSet, tmp_path: Path) -> None:
    generator = Fake(lambda request: f"seen in {request.image_id}", per="image")
    assert write_augmented_set(source, generator, tmp_path / "out").captions == 3
    found = read(tmp_path / "out")
    assert found.captions[0][-1] == "seen in A"
    assert found.provenance[0][-1] == Provenance(generator="fake", model="fake 1", source="A", seed=0)


def test_made_images_join_the_group_of_theirs(source: RetrievalSet, tmp_path: Path) -> None:
    generator = Fake(lambda request: Image.new("L", (3, 3), 9))
    written = write_augmented_set(source, generator, tmp_path / "out", seed=2)
    assert (written.captions, written.images) == (0, 4)
    found = read(tmp_path / "out")
    assert found.n_images == 7 and found.group == (0, 1, 1, 0, 0, 1, 1)
    assert found.captions[3:5] == (("a red dog",), ("a dog runs",))
    maker = Provenance(generator="fake", model="fake 1", source="a red dog", seed=2, made="image")
    assert found.provenance[3] == (maker,) and found.ids[3].startswith("A fake ")
    assert found.load(3).size == (3, 3) and found.load(3).getpixel((0, 0)) == (9, 9, 9)


def test_an_augmented_set_is_augmented_again_from_what_humans_made(source: RetrievalSet, tmp_path: Path) -> None:
    write_augmented_set(source, Fake(lambda request: f"once {request.caption}"), tmp_path / "one", seed=1)
    write_augmented_set(read(tmp_path / "one"), Fake(lambda _: Image.new("RGB", (2, 2))), tmp_path / "two", seed=2)
    last = Fake(lambda request: f"thrice {request.caption}", per="image")
    write_augmented_set(read(tmp_path / "two"), last, tmp_path / "three", seed=3)
    found = read(tmp_path / "three")
    assert [request.caption for request in last.asked[0]] == ["a red dog", "two cats", "two cats sit"]
    assert found.captions[1] == ("two cats", "once two cats", "thrice two cats")
    assert [maker.seed if maker else None for maker in found.provenance[1]] == [None, 1, 3]
    assert found.n_images == 7 and found.group == (0, 1, 1, 0, 0, 1, 1)
    assert found.load(4).size == (2, 2) and found.load(0).size == (4, 2)


def test_nothing_and_what_the_image_has_already_are_dropped(source: RetrievalSet, tmp_path: Path) -> None:
    answers = {"a red dog": "a dog  runs", "a dog runs": " ", "two cats": None, "two cats sit": "two cats"}
    written = write_augmented_set(source, Fake(lambda request: answers[request.caption]), tmp_path / "out")
    assert (written.captions, written.dropped) == (1, 3)
    assert read(tmp_path / "out").captions[2] == ("two cats sit", "two cats")
    with pytest.raises(UserError, match="fake made nothing new of tiny/train"):
        write_augmented_set(source, Fake(lambda request: None), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_pictures_without_files_are_saved(tmp_path: Path) -> None:
    drawn = RetrievalSet(
        name="drawn",
        split="train",
        captions=(("one",), ("two",)),
        ids=("x", "y"),
        group=(0, 1),
        load=lambda row: Image.effect_mandelbrot((9, 7), (-2, -1, 1, 1), 9 + row).convert("RGB"),
    )
    write_augmented_set(drawn, Fake(lambda request: f"drawn: {request.caption}"), tmp_path / "out")
    found = read(tmp_path / "out")
    assert found.ids == ("x", "y") and found.captions[0] == ("one", "drawn: one")
    assert [found.load(i).tobytes() for i in range(2)] == [drawn.load(i).tobytes() for i in range(2)]
    assert found.load(0).tobytes() != found.load(1).tobytes()


def test_a_missing_image_is_one_sentence(source: RetrievalSet, tmp_path: Path) -> None:
    write_augmented_set(source, Fake(lambda request: f"{request.caption} again"), tmp_path / "out")
    (tmp_path / "pictures" / "b.png").unlink()
    with pytest.raises(UserError, match=r"augmented.json, row 3: image file .*b.png is missing \(1 of 3 are\)"):
        read(tmp_path / "out")


def test_nothing_is_left_of_a_failure_and_nothing_written_over(source: RetrievalSet, tmp_path: Path) -> None:
    calls = []

    def fails(request: Request) -> Result:
        calls.append(request)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return "fine"

    with pytest.raises(KeyboardInterrupt):
        write_augmented_set(source, Fake(fails), tmp_path / "out", batch_size=1)
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "train.json"}
    for name in ("train.json", "pictures"):
        with pytest.raises(UserError, match="exists and is not empty"):
            write_augmented_set(source, Fake(lambda request: "x"), tmp_path / name)
    assert json.loads((tmp_path / "train.json").read_text()) == ROWS


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda requests: None, "with NoneType; return a list"),
        (lambda requests: "caption", "with 7 results; return a list"),
        (lambda requests: ["caption"], "answered 4 requests with 1 results"),
        (lambda requests: [3] * 4, "returned a int"),
    ],
)
def test_odd_answers_are_refused(source: RetrievalSet, tmp_path: Path, answer, said: str) -> None:
    class Odd(Fake):
        def __call__(self, requests: Sequence[Request]) -> list[Result]:
            return answer(requests)

    with pytest.raises(UserError, match=said):
        write_augmented_set(source, Odd(lambda request: None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_captions_out_of_a_file(source: RetrievalSet, tmp_path: Path) -> None:
    lines = [
        {"image_id": "A", "caption": "one"},
        {"image_id": "pictures/b.png", "caption": "two"},
        {"image_id": "A", "caption": "three"},
        {"image_id": "unknown", "caption": "four"},
    ]
    path = tmp_path / "made.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    generator = JsonLines(path=path, title="llama")
    assert isinstance(generator, Generator)
    write_augmented_set(source, generator, tmp_path / "out", copies=1)
    found = read(tmp_path / "out")
    assert found.captions == (("a red dog", "a dog runs", "one", "three"), ("two cats", "two"), ("two cats sit",))
    maker = found.provenance[0][-1]
    assert maker is not None and maker.generator == "llama" and maker.model.startswith("made.jsonl sha256:")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ('{"image_id": "A", "caption": "x"}\nnonsense', "line 2: not JSON"),
        ('{"image": "A", "caption": "x"}', "line 1: expected"),
        ('{"image_id": "A", "caption": ["x"]}', "line 1: expected"),
        ('{"image_id": true, "caption": "x"}', "line 1: expected"),
        ("[1]", "line 1: expected"),
    ],
)
def test_files_that_are_no_captions(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "made.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        JsonLines(path=path)
    with pytest.raises(UserError, match="cannot be read"):
        JsonLines(path=tmp_path / "absent.jsonl")


def test_any_function(source: RetrievalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_paraphrases.py").write_text(
        "def louder(requests):\n    return [r.caption.upper() for r in requests]\n\nnothing = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    generator = Function(path="my_paraphrases:louder")
    assert isinstance(generator, Generator)
    write_augmented_set(source, generator, tmp_path / "out")
    found = read(tmp_path / "out")
    assert found.captions[1] == ("two cats", "TWO CATS")
    maker = found.provenance[1][1]
    assert maker is not None and maker.generator == "my_paraphrases:louder"
    assert maker.model.startswith("my_paraphrases.py sha256:")
    for path, said in (
        ("my_paraphrases", "must read module:function"),
        ("my_paraphrases:quieter", "is not here"),
        ("no_such_module_here:f", "is not here"),
        ("my_paraphrases:nothing", "is a int; name a function"),
    ):
        with pytest.raises(UserError, match=said):
            Function(path=path)
    assert Function(path="builtins:len").model == "builtins:len"
