"""CIDEr and BLEU of captions, by `pycocoevalcap`, the evaluation code of COCO.

COCO's server cuts captions into words with a tokenizer of Stanford's, in Java. Here `words` does that without Java, by
its visible rules: lower case, no punctuation, clitics apart. The same rule is applied to both sides, so scores are
close to the server's, but not the same to the digit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from fastmat.errors import UserError
from fastmat.tasks.base import Metric, mean

GRAMS = 4
# A hyphenated word stays one; what follows an apostrophe is a word of its own, with "n" where it negates.
WORD = re.compile(r"n't\b|(?<=\w)'\w+|\w+?(?=n't\b)|\w+(?:-\w+)*")
# pycocoevalcap's, which keep an empty caption from a division by zero.
SMALL, TINY = 1e-9, 1e-15


def check_scorers() -> None:
    """Raises UserError where the library is missing."""
    if find_spec("pycocoevalcap") is None:
        raise UserError(
            "captions are scored by pycocoevalcap, which is not installed: pip install 'fastmat-vlm[tasks]'"
        )


def words(text: str) -> str:
    """The words of a caption with blanks between them.

    >>> words("A man's dog isn't well-fed, it barks!")
    "a man 's dog is n't well-fed it barks"
    """
    return " ".join(WORD.findall(text.lower().replace("\u2019", "'")))


def caption_metrics(said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """ "cider", "bleu1" ... "bleu4" of one caption per picture against its human captions.

    CIDEr is CIDEr-D; its weights of words are those of all the references given, so it is that of this set of pictures
    and of no part of it, and with fewer than two pictures it says nothing. Its interval keeps the weights.
    """
    check_scorers()
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    cider, bleu = CiderScorer(), BleuScorer(n=GRAMS)
    for caption, own in zip(said, references, strict=True):
        pair = words(caption), [words(reference) for reference in own]
        cider += pair
        bleu += pair
    metrics = {"cider": mean(torch.as_tensor(cider.compute_score()[1]))}
    counts = torch.tensor([_counts(bleu, row) for row in bleu.ctest], dtype=torch.float64)
    return metrics | {f"bleu{n}": Metric(sums=counts, value=_Bleu(n)) for n in range(1, GRAMS + 1)}


def _counts(scorer: object, row: dict[str, list[int]]) -> list[float]:
    """n-grams right, n-grams said, words said, words of the reference whose length is closest."""
    length = row["testlen"]
    closest = scorer._single_reflen(row["reflen"], "closest", length)  # type: ignore[attr-defined]
    return [*row["correct"], *row["guess"], length, closest]


class _Bleu:
    """BLEU of up to n-grams from totals [..., 2 GRAMS + 2] of `_counts` (Papineni et al., ACL 2002), times 100.

    Written out because the library gives no totals of a resample; on the whole set it is the library's value.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, totals: Tensor) -> Tensor:
        right, guessed, (said, reference) = (
            totals[..., : self.n],
            totals[..., GRAMS : GRAMS + self.n],
            totals[..., -2:].unbind(-1),
        )
        precision = ((right + TINY) / (guessed + SMALL)).prod(-1) ** (1 / self.n)
        ratio = (said + TINY) / (reference + SMALL)
        return 100 * precision * torch.exp((1 - 1 / ratio).clamp(max=0))
