"""EDA's four operations, each against what it may do to a caption; seeds; the lexicon behind it."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmat.augment.eda import EDA, OPERATIONS
from fastmat.augment.offline import Generator, Request
from fastmat.errors import UserError

ENTRIES = {
    "dog": {"n": ["hound", "pooch"]},
    "red": {"a": ["crimson", "ruddy"]},
    "jump": {"v": ["leap", "skip"]},
    "the": {"n": ["article"]},
    "snow": {"n": ["snowfall"]},
}
CAPTION = "The red dogs, jumping in the deep snow with a small brown ball and two cats"
WORDS = CAPTION.split(" ")
SYNONYMS = {1: ("crimson", "ruddy"), 2: ("hounds,", "pooches,"), 3: ("leaping", "skipping"), 7: ("snowfall",)}


@pytest.fixture
def lexicon(tmp_path: Path) -> Path:
    path = tmp_path / "lexicon.json"
    path.write_text(json.dumps(ENTRIES))
    return path


def request(caption: str, seed: int = 0) -> Request:
    return Request(image_id="a", caption=caption, load=lambda: Image.new("RGB", (1, 1)), copy=0, seed=seed)


def variants(lexicon: Path, operation: str, *, alpha: float = 0.1, caption: str = CAPTION) -> list[str | None]:
    eda = EDA(lexicon=lexicon, alpha=alpha, operations=(operation,))  # type: ignore[arg-type]
    return eda([request(caption, seed) for seed in range(400)])


@pytest.mark.parametrize(("alpha", "count"), [(0.1, 1), (0.2, 3), (1.0, 4)])
def test_synonyms_replace_words_that_have_some(lexicon: Path, alpha: float, count: int) -> None:
    """16 words: 10 % are one of them, 20 % three, all of them the four that have synonyms."""
    changed_places, used = Counter[int](), Counter[str]()
    for variant in variants(lexicon, "synonym", alpha=alpha):
        words = str(variant).split(" ")
        changed = [i for i, (before, after) in enumerate(zip(WORDS, words, strict=True)) if before != after]
        assert len(changed) == count
        assert all(words[i] in SYNONYMS[i] for i in changed)
        changed_places.update(changed)
        used.update(words[i] for i in changed)
    assert set(changed_places) == set(SYNONYMS) and min(changed_places.values()) > 60
    assert set(used) == {synonym for own in SYNONYMS.values() for synonym in own}


@pytest.mark.parametrize(("alpha", "count"), [(0.1, 1), (0.2, 3)])
def test_synonyms_are_inserted_anywhere_without_their_marks(lexicon: Path, alpha: float, count: int) -> None:
    allowed = {synonym.strip(",") for own in SYNONYMS.values() for synonym in own}
    places, used = set(), set()
    for variant in variants(lexicon, "insert", alpha=alpha):
        words = str(variant).split(" ")
        inserted = list((Counter(words) - Counter(WORDS)).elements())
        assert len(inserted) == count and set(inserted) <= allowed
        assert [word for word in words if word not in allowed] == WORDS
        used |= set(inserted)
        places |= {i for i, word in enumerate(words) if word in allowed}
    assert used == allowed and {0, len(WORDS)} <= places


def test_two_words_swap(lexicon: Path) -> None:
    pairs = set()
    for variant in variants(lexicon, "swap"):
        words = str(variant).split(" ")
        (one, other) = [i for i, (before, after) in enumerate(zip(WORDS, words, strict=True)) if before != after]
        assert (words[one], words[other]) == (WORDS[other], WORDS[one])
        pairs.add((one, other))
    assert len(pairs) > 100  # of 120


def test_words_are_deleted_with_the_probability_and_one_stays(lexicon: Path) -> None:
    gone = Counter[str]()
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        left = OPERATIONS["delete"](WORDS, SYNONYMS, rng, alpha=0.25)
        gone.update((Counter(WORDS) - Counter(left)).elements())
        assert left == [word for word in WORDS if word in left]
    assert all(abs(gone[word] / 2000 - 0.25) < 0.05 for word in WORDS)
    one_left = {tuple(OPERATIONS["delete"](["a", "dog"], {}, np.random.default_rng(s), alpha=1.0)) for s in range(30)}
    assert one_left == {("a",), ("dog",)}


def test_a_result_is_new_and_depends_on_the_seed_alone(lexicon: Path) -> None:
    eda = EDA(lexicon=lexicon)
    assert isinstance(eda, Generator) and eda.per == "caption" and eda.copies is None
    seeds = list(range(60))
    together = eda([request(CAPTION, seed) for seed in seeds])
    assert [eda([request(CAPTION, seed)])[0] for seed in seeds] == together
    assert CAPTION not in together and None not in together and len(set(together)) > 40
    lengths = {len(str(variant).split()) - len(WORDS) for variant in together}
    assert {-1, 0, 1} <= lengths
    assert eda([request("dog"), request("two")]) == [eda([request("dog")])[0], None]


def test_the_model_of_its_provenance_is_the_lexicon(lexicon: Path) -> None:
    before = EDA(lexicon=lexicon).model
    lexicon.write_text(json.dumps({**ENTRIES, "cat": {"n": ["feline"]}}))
    assert before.startswith("lexicon.json sha256:") and EDA(lexicon=lexicon).model != before


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"alpha": 1.1}, {"operations": ()}, {"lexicon": Path("nowhere")}])
def test_what_it_refuses(lexicon: Path, wrong) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        EDA(**{"lexicon": lexicon, **wrong})
