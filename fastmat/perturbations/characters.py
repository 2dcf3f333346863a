"""Slips in characters, by nlpaug (Ma, 2019), with which Qiu et al. (arXiv 2212.08044) perturbed captions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastmat.errors import UserError

KINDS = ("keyboard", "ocr", "char_insert", "char_replace", "char_swap", "char_delete")
ACTIONS = {"char_insert": "insert", "char_replace": "substitute", "char_swap": "swap", "char_delete": "delete"}


def augmenter(kind: str, share: float) -> Any:
    """What perturbs the characters of a `share` of the words, otherwise with nlpaug's defaults: 30 % of a word's
    characters. Raises UserError where nlpaug is not installed."""
    try:
        import nlpaug.augmenter.char as library
    except ImportError as error:
        raise UserError(
            f"kind '{kind}' needs nlpaug, which cannot be imported ({error}); pip install 'fastmat-vlm[perturbations]'"
        ) from error
    if kind == "keyboard":
        return library.KeyboardAug(aug_word_p=share)
    if kind == "ocr":
        return library.OcrAug(aug_word_p=share)
    return library.RandomCharAug(ACTIONS[kind], aug_word_p=share)


def augmented(augmenter: Any, caption: str, rng: np.random.Generator) -> str:
    """The caption perturbed; as it was where nothing in it can be."""
    with seeded(rng):
        found = augmenter.augment(caption)
    return str(found[0]) if found else caption


@contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Inside, the global streams, from which nlpaug draws, are seeded by `rng`; as before outside."""
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    seed = int(rng.integers(2**32))
    try:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
