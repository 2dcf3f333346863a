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


def told(caption: str) -> tuple[list[str], list[str], tuple[int, int]]:
    """Read a caption back: digits and colours in spoken order, and where the second spoken object's partner lies.

    The direction (x, y) is that of the object the relation is said of, seen from the other one; x grows to the right,
    y downwards.
    """
    words = caption.split()
    across = {"left": -1, "right": 1}
    along = dict.fromkeys(("above", "over", "higher", "upper", "top"), -1)
    along |= dict.fromkeys(("below", "under", "beneath", "lower", "bottom"), 1)
    x = next((across[w] for w in words if w in across), 0)
    y = next((along[w] for w in words if w in along), 0)
    return [w for w in words if w in DIGITS], [w for w in words if w in COLOURS], (x, y)


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_unique_and_say_exactly_their_description(split: str) -> None:
    found, labels = digits_set(split), digits_labels(split)  # type: ignore[arg-type]
    captions = [c for own in dict.fromkeys(found.captions) for c in own]
    assert len(captions) == len(set(captions)) == 5 * len(set(found.group))
    where = {"left of": (-1, 0), "above": (0, -1), "upper left of": (-1, -1), "lower left of": (-1, 1)}
    for own, label in zip(found.captions, labels, strict=True):
        assert len({c.split()[0] + " ".join(sorted(c.split())) for c in own}) == 5  # in words and their order
        for caption in own:
            assert 8 <= len(caption.split()) <= 14
            spoken_digits, spoken_colours, direction = told(caption)
            objects = list(zip(spoken_digits, spoken_colours, strict=True))
            assert len(objects) == 2
            # Fronted relations and "A and to its right B" name the other object first.
            if (
                caption.startswith(("to ", "on ", "at ", *RELATION_STARTS))
                or " has " in caption
                or " and " in (caption if " it" in caption else "")
            ):
                objects.reverse()
            if objects[0] != (label.first_digit, label.first_colour):
                objects.reverse()
                direction = (-direction[0], -direction[1])
            assert (*objects[0], *objects[1]) == (*label[:2], *label[3:]), caption
            assert direction == where[label.relation], caption


RELATION_STARTS = tuple(
    f"{word} " for word in ("left", "right", "above", "below", "over", "under", "beneath", "higher", "lower")
)


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
        sign = {"left of": (-1, 0), "above": (0, -1), "upper left of": (-1, -1), "lower left of": (-1, 1)}
        assert tuple(0 if abs(v) < 8 else int(np.sign(v)) for v in (x, y)) == sign[label.relation], (i, label)


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
