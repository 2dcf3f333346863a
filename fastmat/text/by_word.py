"""Candidates that depend on a word alone: what the sources without a language model have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice, zip_longest
from typing import NamedTuple

from fastmat.quirks import Quirks
from fastmat.text.candidates import Found, allowed
from fastmat.text.words import is_stop_word

EDGES = re.compile(r"([\W_]*)(.*?)([\W_]*)", flags=re.DOTALL)

Propose = Callable[[Sequence[str]], Sequence[Sequence[str]]]


class Core(NamedTuple):
    """A word without the marks on its edges, which stay where they are when it is substituted."""

    before: str
    word: str
    after: str


def core_of(word: str, *, quirks: Quirks) -> Core | None:
    """What of a word between blanks is looked up; None where it may not be attacked.

    A stop word may not, nor what has no letter and no digit. With `Quirks.case_sensitive_filters` marks are part of
    the word, as in the published code, which takes everything between two blanks for a word.

    >>> core_of('"Dogs,"', quirks=Quirks()), core_of("The,", quirks=Quirks()), core_of("--", quirks=Quirks())
    (Core(before='"', word='Dogs', after=',"'), None, None)
    """
    exact = quirks.case_sensitive_filters
    match = EDGES.fullmatch(word)
    assert match is not None
    core = Core("", word, "") if exact else Core(*match.groups())
    return None if not core.word or is_stop_word(core.word, case_sensitive=exact) else core


def candidates_by_word(
    captions: Sequence[str], propose: Propose, *, quirks: Quirks, top_k: int | None = None
) -> list[Found]:
    """What a `CandidateSource` returns, made of what `propose` says about words.

    propose: candidates of each of the distinct words it is given, best first, in the case in which they stand. What
        `allowed` refuses is dropped here, and of the rest all but the first `top_k`.
    """
    cores = [
        {i: core for i, word in enumerate(caption.split(" ")) if (core := core_of(word, quirks=quirks))}
        for caption in captions
    ]
    distinct = list(dict.fromkeys(core.word for of in cores for core in of.values()))
    kept = {
        word: [c for c in dict.fromkeys(proposed) if c and allowed(word, c, quirks)][:top_k]
        for word, proposed in zip(distinct, propose(distinct), strict=True)
    }
    return [
        {
            i: tuple(f"{core.before}{c}{core.after}" for c in kept[core.word])
            for i, core in of.items()
            if kept[core.word]
        }
        for of in cores
    ]


def in_turn(lists: Iterable[Iterable[str]], *, at_most: int | None = None) -> list[str]:
    """The first of every list, then the second of every list, and so on, each string once.

    >>> in_turn([["a", "b", "c"], ["x"], ["y", "a", "z"]], at_most=4)
    ['a', 'x', 'y', 'b']
    """
    rounds = chain.from_iterable(zip_longest(*lists))
    return list(islice(dict.fromkeys(item for item in rounds if item is not None), at_most))
