"""Synonyms out of a small lexicon, by hand; and files that are none."""

import gzip
import json
from pathlib import Path

import pytest

from fastmat.errors import UserError
from fastmat.quirks import Quirks
from fastmat.text.candidates import CandidateSource
from fastmat.text.lexicon import Lexicon

ENTRIES = {
    "dog": {"n": ["hot dog", "hound", "watchman", "frank"], "v": ["chase", "tail"]},
    "building": {"n": ["edifice"]},
    "build": {"v": ["make", "construct", "run"]},
    "red": {"a": ["crimson", "ruddy"], "n": ["redness"]},
    "jump": {"v": ["leap", "skip", "rise", "bound off"]},
    "the": {"n": ["article"]},
    "man": {"n": ["bloke", "The", "MAN"], "v": []},
    "犬": {"n": ["狗"]},
}


@pytest.fixture(params=["plain.json", "packed.json.gz"])
def path(request, tmp_path: Path) -> Path:
    content = json.dumps(ENTRIES).encode()
    file = tmp_path / request.param
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def test_synonyms_stand_in_the_form_of_the_word(path: Path) -> None:
    source = Lexicon(path=path)
    assert isinstance(source, CandidateSource) and source.mlm is None
    found = source(["The dog jumped (Red) buildings", "two dogs jumping , building men man 犬 !"], quirks=Quirks())
    assert found == [
        {
            1: ("chase", "hound", "tail", "watchman", "frank"),
            2: ("leaped", "skipped"),
            3: ("(crimson)", "(redness)", "(ruddy)"),
            4: ("edifices",),
        },
        {
            1: ("hounds", "chases", "franks", "tails"),  # no regular plural: watchman
            2: ("leaping", "skipping", "rising"),
            4: ("edifice", "making", "constructing", "running"),
            6: ("bloke",),
            7: ("狗",),
        },
    ]


def test_top_k_counts_what_is_left(path: Path) -> None:
    assert Lexicon(path=path, top_k=2)(["dog"], quirks=Quirks()) == [{0: ("chase", "hound")}]


def test_several_words_only_as_published_and_for_lemmas(path: Path) -> None:
    quirks = Quirks(blanks_in_candidates=True, case_sensitive_filters=True)
    assert Lexicon(path=path)(["dog dogs man"], quirks=quirks) == [
        {
            0: ("hot dog", "chase", "hound", "tail", "watchman", "frank"),
            1: ("hounds", "chases", "franks", "tails"),
            2: ("bloke", "The", "MAN"),
        }
    ]


def test_each_caption_stands_for_itself(path: Path) -> None:
    captions = ["a red dog", "jump", "the", "", "red dogs jumping"]
    source = Lexicon(path=path)
    assert source(captions, quirks=Quirks()) == [source([caption], quirks=Quirks())[0] for caption in captions]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.json.gz", gzip.compress(json.dumps(ENTRIES).encode())[:-20], "damaged"),
        ("plain.json.gz", b"{}", "cannot be read"),
        ("cut.json", b'{"dog": ', "damaged"),
        ("deep.json", b"[" * 100000, "damaged"),
        ("latin.json", b'{"caf\xe9": {}}', "damaged"),
        ("list.json", b'["dog"]', "must hold .* got list"),
        ("empty.json", b"{}", "must hold .* got nothing"),
        ("flat.json", b'{"dog": ["hound"]}', "must hold .* at 'dog'"),
        ("word.json", b'{"dog": {"n": "hound"}}', "must hold .* at 'dog'"),
        ("number.json", b'{"dog": {"n": [1]}}', "must hold .* at 'dog'"),
        ("pickled.json", b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94.", "damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as raised:
        Lexicon(path=tmp_path / name)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_missing_files_and_bad_numbers(tmp_path: Path, path: Path) -> None:
    for absent in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            Lexicon(path=absent)
    with pytest.raises(UserError, match="top_k"):
        Lexicon(path=path, top_k=0)
