"""EDA (Wei and Zou, EMNLP 2019): a caption with a few words replaced by synonyms, inserted, swapped or deleted.

Published: alpha 0.1 of the words but at least one, equally many results of the four operations. Here each result is of
one operation drawn uniformly, a word keeps the marks on its edges, and a result equal to its source is drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from fastmat.augment.files import named_file
from fastmat.augment.offline import Request
from fastmat.errors import UserError
from fastmat.quirks import Quirks
from fastmat.text.by_word import core_of
from fastmat.text.candidates import Found
from fastmat.text.lexicon import Lexicon

Synonyms = Mapping[int, Sequence[str]]  # of the word at a place, in the form in which it stands there
ATTEMPTS = 20
T = TypeVar("T")


def synonym_replacement(
    words: Sequence[str], synonyms: Synonyms, rng: np.random.Generator, *, alpha: float
) -> list[str]:
    """Words that have synonyms, drawn without replacement; stop words have none."""
    changed = list(words)
    places = rng.permutation(sorted(synonyms))[: how_many(words, alpha)]
    for place in places.tolist():
        changed[place] = one_of(synonyms[place], rng)
    return changed


def random_insertion(words: Sequence[str], synonyms: Synonyms, rng: np.random.Generator, *, alpha: float) -> list[str]:
    """A synonym of some word, at any place, as often as `alpha` says."""
    changed = list(words)
    for _ in range(how_many(words, alpha) if synonyms else 0):
        synonym = one_of(synonyms[one_of(sorted(synonyms), rng)], rng)
        core = core_of(synonym, quirks=Quirks())
        changed.insert(int(rng.integers(len(changed) + 1)), core.word if core else synonym)
    return changed


def random_swap(words: Sequence[str], synonyms: Synonyms, rng: np.random.Generator, *, alpha: float) -> list[str]:
    """Two different places change their words, as often as `alpha` says."""
    changed = list(words)
    for _ in range(how_many(words, alpha) if len(words) > 1 else 0):
        one, other = rng.choice(len(words), 2, replace=False).tolist()
        changed[one], changed[other] = changed[other], changed[one]
    return changed


def random_deletion(words: Sequence[str], synonyms: Synonyms, rng: np.random.Generator, *, alpha: float) -> list[str]:
    """Each word goes with probability `alpha`; one always stays."""
    kept = [word for word, draw in zip(words, rng.random(len(words)), strict=True) if draw >= alpha]
    return kept or [one_of(words, rng)]


OPERATIONS: Mapping[str, Callable[..., list[str]]] = {
    "synonym": synonym_replacement,
    "insert": random_insertion,
    "swap": random_swap,
    "delete": random_deletion,
}


def how_many(words: Sequence[str], alpha: float) -> int:
    return max(1, int(alpha * len(words)))


def one_of(items: Sequence[T], rng: np.random.Generator) -> T:
    return items[int(rng.integers(len(items)))]


class EDA:
    """Synonyms, insertions, swaps and deletions, without a model.

    lexicon: the file of synonyms, as for the lexicon of candidates.
    alpha: share of the words that change, and probability of a deletion.
    operations: which of synonym, insert, swap, delete.
    top_k: synonyms per word to draw from.
    Raises UserError for an alpha outside 0 to 1, no operation, and a file that is no lexicon.
    """

    name = "eda"
    per: Literal["caption", "image"] = "caption"
    copies = None

    def __init__(
        self,
        *,
        lexicon: Path,
        alpha: float = 0.1,
        operations: tuple[Literal["synonym", "insert", "swap", "delete"], ...] = (
            "synonym",
            "insert",
            "swap",
            "delete",
        ),
        top_k: int = 10,
    ) -> None:
        if not 0 < alpha <= 1:
            raise UserError(f"alpha must be a share above 0 and up to 1, got {alpha}")
        if not operations:
            raise UserError(f"operations must name at least one of {', '.join(OPERATIONS)}")
        self.alpha = alpha
        self.operations = operations
        self.lexicon = Lexicon(path=lexicon, top_k=top_k)
        self.model = named_file(lexicon)

    def __call__(self, requests: Sequence[Request]) -> list[str | None]:
        found = self.lexicon([request.caption for request in requests], quirks=Quirks())
        return [self.variant(request, synonyms) for request, synonyms in zip(requests, found, strict=True)]

    def variant(self, request: Request, synonyms: Found) -> str | None:
        """One other caption; None where no operation changes this one, such as a single word without synonyms."""
        words, rng = request.caption.split(" "), np.random.default_rng(request.seed)
        for _ in range(ATTEMPTS):
            changed = OPERATIONS[one_of(self.operations, rng)](words, synonyms, rng, alpha=self.alpha)
            if changed != words:
                return " ".join(changed)
        return None
