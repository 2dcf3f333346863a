"""Nearest words against a comparison with every other word, and files of word vectors."""

import gzip
import random
import re
from collections.abc import Sequence
from math import hypot, nan
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastmat.errors import UserError
from fastmat.quirks import Quirks
from fastmat.text import neighbours
from fastmat.text.candidates import CandidateSource, Found
from fastmat.text.neighbours import Neighbours
from fastmat.text.vectors import read_vectors

OFFICIAL = Quirks(case_sensitive_filters=True, blanks_in_candidates=True)


def vectors(count: int = 60, *, size: int = 5, seed: int = 0) -> dict[str, list[float]]:
    draw = random.Random(seed)
    words = ["dog", "cat", "Cat", "hound", "the", "u.s.", "new york", "dogs"]
    return {
        word: [round(draw.gauss(0, 1), 4) for _ in range(size)]
        for word in [*words, *(f"w{i}" for i in range(count - len(words)))]
    }


def write(path: Path, table: dict[str, list[float]], *, header: bool = False) -> Path:
    lines = [f"{len(table)} {len(next(iter(table.values())))}"] * header
    lines += [" ".join([word, *map(str, row)]) for word, row in table.items()]
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / hypot(*a) / hypot(*b)


def nearest(table: dict[str, list[float]], word: str, top_k: int) -> list[tuple[float, str]]:
    others = [(cosine(table[word], row), other) for other, row in table.items() if other != word]
    return sorted(others, key=lambda pair: -pair[0])[:top_k]


class Echo:
    """A fallback that proposes the same for all; `asked` holds the captions it saw."""

    mlm = None

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, captions: Sequence[str], *, quirks: Quirks) -> list[Found]:
        self.asked += captions
        return [{i: ("stand-in", "end.") for i, _ in enumerate(c.split(" "))} for c in captions]


def test_the_nearest_words_are_found_in_chunks_of_any_size(tmp_path: Path, monkeypatch) -> None:
    table = vectors()
    path = write(tmp_path / "glove.txt", table)
    captions = ["w1 w2 w3 dog", "dog w4 unseen the", "cat w1"]
    found = Neighbours(path=path, top_k=7)(captions, quirks=Quirks())
    for caption, of in zip(captions, found, strict=True):
        expected = {}
        for i, word in enumerate(caption.split(" ")):
            if word in table and word != "the":
                near = [other for _, other in nearest(table, word, 7)]
                dropped = ("the", word.capitalize(), "u.s.", "new york")
                expected[i] = tuple(other for other in near if other not in dropped)
        assert of == expected
    monkeypatch.setattr(neighbours, "COSINES", 2 * len(table))
    again = Neighbours(path=path, top_k=7)
    assert again(captions[1:], quirks=Quirks()) + again(captions[:1], quirks=Quirks()) == found[1:] + found[:1]


def test_the_published_lookup_takes_a_word_as_it_stands(tmp_path: Path) -> None:
    table = vectors(9)
    source = Neighbours(path=write(tmp_path / "glove.txt", table), top_k=8)
    assert isinstance(source, CandidateSource) and source.mlm is None
    caption = "Dog dog (dog), Cat DOGS"
    near = {word: [other for _, other in nearest(table, word, 8) if other != "u.s."] for word in table}
    single = [other for other in near["dog"] if other not in ("the", "new york")]
    found = source([caption], quirks=Quirks())[0]
    assert found[0] == found[1] == tuple(single)
    assert found[2] == tuple(f"({other})," for other in single)
    assert found[3] == tuple(other for other in near["Cat"] if other not in ("cat", "the", "new york"))
    assert set(found) == {0, 1, 2, 3, 4}
    official = source([caption], quirks=OFFICIAL)[0]
    assert set(official) == {1, 3}
    assert official[1] == tuple(other for other in near["dog"] if other != "the")
    assert "cat" in official[3] and "new york" in official[3]


def test_computed_once_per_word(tmp_path: Path) -> None:
    source = Neighbours(path=write(tmp_path / "glove.txt", vectors()))
    first = source(["dog w1"], quirks=Quirks())
    source.vectors.fill_(nan)  # to be looked at no more
    assert source(["w1 dog"], quirks=Quirks()) == [{0: first[0][1], 1: first[0][0]}]


def test_far_words_are_left_out(tmp_path: Path) -> None:
    table = vectors()
    source = Neighbours(path=write(tmp_path / "glove.txt", table), top_k=50, min_cosine=0.4)
    near = [other for value, other in nearest(table, "w1", 50) if value >= 0.4]
    assert 0 < len(near) < 40
    assert source(["w1"], quirks=OFFICIAL)[0][0] == tuple(w for w in near if w not in ("the", "u.s."))


def test_words_without_a_vector_go_to_the_fallback(tmp_path: Path) -> None:
    echo = Echo()
    source = Neighbours(path=write(tmp_path / "glove.txt", vectors()), fallback=echo)
    found = source(["a dog", "the wombat -- dog", "", "Wombat"], quirks=Quirks())
    assert echo.asked == ["the wombat -- dog", "Wombat"]
    assert set(found[1]) == {1, 3} and found[1][1] == ("stand-in",)
    assert found[1][3] == found[0][1] and found[2] == {} and found[3] == {0: ("stand-in",)}
    assert source(["Dog"], quirks=OFFICIAL) == [{0: ("stand-in",)}]


def test_the_fallback_s_language_model_is_the_source_s(tmp_path: Path) -> None:
    from tiny_mlm import tiny_candidates

    masked = tiny_candidates()
    path = write(tmp_path / "glove.txt", vectors())
    source = Neighbours(path=path, fallback=masked)
    assert source.mlm is masked.mlm
    caption = "a red ball in the park"
    assert source([caption], quirks=Quirks()) == masked([caption], quirks=Quirks()) != [{}]


@pytest.mark.parametrize("name", ["glove.txt", "word2vec.txt", "glove.txt.gz", "matrix.safetensors"])
def test_every_format_says_the_same(tmp_path: Path, name: str) -> None:
    table = vectors() | {"nothing": [0.0] * 5}
    if name.endswith("safetensors"):
        save_file({"anything": torch.tensor(list(table.values()))}, tmp_path / name)
        (tmp_path / "matrix.txt").write_text("\n".join(table) + "\n")
    else:
        write(tmp_path / name, table, header=name.startswith("word2vec"))
    words, unit = read_vectors(tmp_path / name)
    assert words == list(table)[:-1]
    expected = torch.tensor(list(table.values())[:-1])
    torch.testing.assert_close(unit, expected / expected.norm(dim=1, keepdim=True))


def test_odd_lines(tmp_path: Path) -> None:
    """Of a word that comes twice the first counts; a separator that is no line feed is part of a word."""
    (tmp_path / "odd.txt").write_bytes("a 1 0 \r\nb\x85c 0 2\na 0 1\n. . . 3 4\n\n".encode())
    words, unit = read_vectors(tmp_path / "odd.txt")
    assert words == ["a", "b\x85c", ". . ."]
    torch.testing.assert_close(unit, torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]]))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("short.txt", b"dog 1 2 3\ncat 1 2\n", "3 numbers .* line 2 begins 'cat 1 2"),
        ("letters.txt", b"dog 1 2 3\ncat 1 x 3\n", "line 2"),
        ("words.txt", b"dog\ncat\n", "line 1"),
        ("nan.txt", b"dog 1 nan\n", "NaN or infinity"),
        ("empty.txt", b"", "no word"),
        ("zero.txt", b"dog 0 0\n", "no word"),
        ("header.txt", b"1 2\n", "no word"),
        ("latin.txt", b"caf\xe9 1 2\n", "UTF-8"),
        ("plain.txt.gz", b"dog 1 2\n", "cannot be read"),
        ("cut.txt.gz", gzip.compress(b"dog 1 2\n" * 99)[:-12], "cannot be read"),
        ("none.safetensors", b"dog 1 2\n", "whole safetensors"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as raised:
        Neighbours(path=tmp_path / name)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_a_matrix_and_its_words_belong_together(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(3, 2)}, path)
    for words in (None, "dog\ncat\n"):
        if words is not None:
            (tmp_path / "m.txt").write_text(words)
        with pytest.raises(UserError, match=r"3 rows, but .*m\.txt names \d words"):
            read_vectors(path)
    for wrong in ({"a": torch.ones(3)}, {"a": torch.ones(3, 2).long()}, {"a": torch.ones(3, 2), "b": torch.ones(1)}):
        save_file(wrong, path)
        with pytest.raises(UserError, match="one matrix of floats"):
            read_vectors(path)


@pytest.mark.parametrize("arguments", [{"top_k": 0}, {"min_cosine": 1.5}, {"min_cosine": nan}])
def test_bad_arguments_are_named(tmp_path: Path, arguments) -> None:
    path = write(tmp_path / "glove.txt", vectors())
    with pytest.raises(UserError, match=re.escape(next(iter(arguments)))):
        Neighbours(path=path, **arguments)
    with pytest.raises(UserError, match="cannot be read"):
        Neighbours(path=tmp_path / "absent.txt")


def test_a_vocabulary_of_one_word_has_no_neighbours(tmp_path: Path) -> None:
    assert Neighbours(path=write(tmp_path / "one.txt", {"dog": [1.0, 2.0]}))(["dog"], quirks=Quirks()) == [{}]
