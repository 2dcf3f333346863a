import itertools

import numpy as np
import pytest

from fastmat.data import digits
from fastmat.data.digits import digits_labels, digits_set
from fastmat.data.digits_text import COLOURS, DIGITS, Description
from fastmat.errors import UserError

SPLITS = ("train", "val", "test")
OPPOSITE = {
    "left of": "right of",
    "above": "below",
    "upper left of": "lower right of",
    "lower left of": "upper right of",
}
# Where the first object lies, seen from the second.
OFFSET = {"left of": (-1, 0), "above": (0, -1), "upper left of": (-1, -1), "lower left of": (-1, 1)}


def distance(a: Description, b: Description) -> int:
    """Brute force: a scene may be described from either object, so compare all phrasings."""
    turned = (b.second_digit, b.second_colour, OPPOSITE[b.relation], b.first_digit, b.first_colour)
    return min(sum(x != y for x, y in zip(a, other, strict=True)) for other in (b, turned))


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("seed", [0, 1])
def test_descriptions_differ_in_three_attributes_and_have_one_image(split: str, seed: int) -> None:
    labels = digits_labels(split, seed=seed)  # type: ignore[arg-type]
    assert len(labels) == 160
    assert min(distance(a, b) for a, b in itertools.combinations(labels, 2)) >= 3
    found = digits_set(split, seed=seed)  # type: ignore[arg-type]
    assert found.group == tuple(range(found.n_images))


def test_splits_share_no_description_and_no_handwriting() -> None:
    described = {split: set(digits_labels(split)) for split in SPLITS}  # type: ignore[arg-type]
    written = {split: {i for rows in pool.values() for i in rows} for split, pool in digits._handwriting(0).items()}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not described[a] & described[b]
        assert not written[a] & written[b]
    assert sum(map(len, written.values())) == 1797


def test_handwriting_shows_the_digit_it_stands_for() -> None:
    _, target = digits._glyphs()
    for pool in digits._handwriting(0).values():
        assert all(DIGITS[target[i]] == word for word, rows in pool.items() for i in rows)


def test_training_has_several_renderings_per_description() -> None:
    found, labels = digits_set("train"), digits_labels("train")
    assert found.n_images == len(labels) == 4800
    assert len(set(labels)) == len(set(found.group)) == 1200
    for start in range(0, 4800, 4):
        rows = slice(start, start + 4)
        assert len(set(labels[rows])) == len(set(found.group[rows])) == len(set(found.captions[rows])) == 1
    assert any(np.asarray(found.load(0)).tobytes() != np.asarray(found.load(i)).tobytes() for i in range(1, 4))


def told(caption: str) -> tuple[tuple[str, str], tuple[int, int], tuple[str, str]]:
    """Read a caption back: the object that the relation is said of, where it lies seen from the other, the other.

    Objects are (digit, colour); x grows to the right, y downwards.
    """
    words = caption.split()
    across = {"left": -1, "right": 1}
    along = dict.fromkeys(("above", "over", "higher", "upper", "top"), -1)
    along |= dict.fromkeys(("below", "under", "beneath", "lower", "bottom"), 1)
    x = next((across[word] for word in words if word in across), 0)
    y = next((along[word] for word in words if word in along), 0)
    digit = [word for word in words if word in DIGITS]
    colour = [word for word in words if word in COLOURS]
    first, second = zip(digit, colour, strict=True)
    fronted = words.index(digit[0]) > min(words.index(word) for word in words if word in across or word in along)
    second_is_placed = fronted or " has " in caption or f"{digit[0]} and " in caption
    return (second, (x, y), first) if second_is_placed else (first, (x, y), second)


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_unique_and_say_exactly_their_description(split: str) -> None:
    found, labels = digits_set(split), digits_labels(split)  # type: ignore[arg-type]
    captions = [caption for own in dict.fromkeys(found.captions) for caption in own]
    assert len(captions) == len(set(captions)) == 5 * len(set(found.group))
    for own, label in zip(found.captions, labels, strict=True):
        assert len({" ".join(sorted(caption.split())) for caption in own}) == 5  # not only the order differs
        for caption in own:
            assert 8 <= len(caption.split()) <= 14
            placed, (x, y), other = told(caption)
            if placed != label[:2]:
                placed, (x, y), other = other, (-x, -y), placed
            assert (placed, (x, y), other) == (label[:2], OFFSET[label.relation], label[3:]), caption


def test_objects_stand_where_the_description_says() -> None:
    found, labels = digits_set("test"), digits_labels("test")
    for i, label in enumerate(labels):
        image = np.asarray(found.load(i), dtype=float)
        centres = []
        for colour in (label.first_colour, label.second_colour):
            close = np.abs(image - digits.RGB[colour]).sum(-1) < 90
            centres.append(np.argwhere(close).mean(0) if close.any() else None)
        if label.first_colour == label.second_colour or any(c is None for c in centres):
            continue
        y, x = centres[0] - centres[1]
        assert tuple(0 if abs(v) < 8 else int(np.sign(v)) for v in (x, y)) == OFFSET[label.relation], (i, label)


def test_equal_seeds_give_equal_sets_and_others_do_not() -> None:
    a, b, c = digits_set("val", seed=3), digits_set("val", seed=3), digits_set("val", seed=4)
    digits._descriptions.cache_clear()
    digits._handwriting.cache_clear()
    again = digits_set("val", seed=3)
    assert a.fingerprint() == b.fingerprint() == again.fingerprint() != c.fingerprint()
    pictures = [[np.asarray(s.load(i)).tobytes() for i in range(160)] for s in (a, again, c)]
    assert pictures[0] == pictures[1] != pictures[2]
    assert a.load(0).mode == "RGB"
    assert a.load(0).size == (32, 32)


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="no split 'tset'; did you mean 'test'"):
        digits_set("tset")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="seed must not be negative"):
        digits_set("test", seed=-1)
