"""The words of the built-in set: descriptions and their captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
RELATIONS = ("left of", "above", "upper left of", "lower left of")

NOUNS = ("digit", "number", "numeral", "figure")
VERBS = ("is", "stands", "sits", "appears")
MADE = ("drawn", "written", "painted")
PICTURES = ("picture", "image", "photo", "drawing")

# Relation -> how the first object stands to the second; how the second stands to the first; and the same two said of
# something already named.
FORWARD = {
    "left of": ("to the left of", "left of", "on the left side of"),
    "above": ("above", "over", "higher than", "on top of"),
    "upper left of": ("to the upper left of", "above and left of", "at the top left of"),
    "lower left of": ("to the lower left of", "below and left of", "at the bottom left of"),
}
BACKWARD = {
    "left of": ("to the right of", "right of", "on the right side of"),
    "above": ("below", "under", "beneath", "lower than"),
    "upper left of": ("to the lower right of", "below and right of", "at the bottom right of"),
    "lower left of": ("to the upper right of", "above and right of", "at the top right of"),
}
FORWARD_ITS = {
    "left of": ("to its left", "on its left side"),
    "above": ("above it", "over it", "on top of it"),
    "upper left of": ("to its upper left", "at its top left"),
    "lower left of": ("to its lower left", "at its bottom left"),
}
BACKWARD_ITS = {
    "left of": ("to its right", "on its right side"),
    "above": ("below it", "under it", "beneath it"),
    "upper left of": ("to its lower right", "at its bottom right"),
    "lower left of": ("to its upper right", "at its top right"),
}

# a: the object that `rel` is said of, b: the other one; `its` is said of a, `back` of b. 8 to 14 words each.
TEMPLATES = (
    "the {a_colour} {noun} {a} {verb} {rel} the {b_colour} {b}",
    "the {a_colour} {a} {rel} the {b_colour} {noun} {b}",
    "{noun} {a} in {a_colour} {rel} {noun} {b} in {b_colour}",
    "{rel} the {b_colour} {b} there is a {a_colour} {noun} {a}",
    "we see a {a_colour} {a} {rel} a {b_colour} {noun} {b}",
    "a {picture} of a {a_colour} {a} {rel} a {b_colour} {b}",
    "the {noun} {a} {made} in {a_colour} {rel} a {b_colour} {b}",
    "the {b_colour} {b} has a {a_colour} {noun} {a} {its}",
    "a {a_colour} {noun} {a} and {back} a {b_colour} {noun} {b}",
)


class Description(NamedTuple):
    """What a scene shows, in words; the relation is the first object's to the second."""

    first_digit: str
    first_colour: str
    relation: str
    second_digit: str
    second_colour: str


def five_captions(descriptions: Sequence[Description], rng: np.random.Generator) -> list[tuple[str, ...]]:
    """For each description five captions of different templates; every caption says all of it."""
    return [
        tuple(_caption(description, TEMPLATES[t], rng) for t in rng.permutation(len(TEMPLATES))[:5])
        for description in descriptions
    ]


def _caption(description: Description, template: str, rng: np.random.Generator) -> str:
    """Fill in a template, speaking of the first or of the second object."""

    def pick(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    first, relation, second = description[:2], description.relation, description[3:]
    forward = rng.integers(2) == 0
    (a, a_colour), (b, b_colour) = (first, second) if forward else (second, first)
    text = template.format(
        a=a,
        a_colour=a_colour,
        b=b,
        b_colour=b_colour,
        rel=pick((FORWARD if forward else BACKWARD)[relation]),
        its=pick((FORWARD_ITS if forward else BACKWARD_ITS)[relation]),
        back=pick((BACKWARD_ITS if forward else FORWARD_ITS)[relation]),
        noun=pick(NOUNS),
        verb=pick(VERBS),
        made=pick(MADE),
        picture=pick(PICTURES),
    )
    return text.replace("a orange", "an orange")
