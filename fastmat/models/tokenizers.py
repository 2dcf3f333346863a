"""Tokenizers of the model families, one caption at a time, without padding."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer


class ClipTokenizer:
    """CLIP's byte-pair encoding: start, pieces, end; a caption that is too long keeps its end token."""

    pad_id = 0
    pad_to_context = False

    def __init__(self, bpe: SimpleTokenizer) -> None:
        self.bpe = bpe
        self._encode = lru_cache(maxsize=1 << 16)(self.bpe.encode)  # the same captions come back at every pass

    def __call__(self, text: str, max_length: int) -> list[int]:
        pieces = self._encode(text)[: max_length - 2]
        return [self.bpe.sot_token_id, *pieces, self.bpe.eot_token_id]


class HubTokenizer:
    """A transformers tokenizer as open_clip wraps it."""

    def __init__(self, wrapped: HFTokenizer, *, context_length: int) -> None:
        self.wrapped = wrapped
        self.context_length = context_length
        self.pad_id: int = wrapped.tokenizer.pad_token_id or 0
        self.pad_to_context = True

    def __call__(self, text: str, max_length: int) -> list[int]:
        ids = self.wrapped([text], context_length=max_length)[0].tolist()
        while ids and ids[-1] == self.pad_id:
            ids.pop()
        return ids


class WordTokenizer:
    """One id per lower-cased word: 0 pads, 1 starts, 2 ends, 3 is unknown, then the vocabulary in order."""

    pad_id = 0
    pad_to_context = False

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = tuple(vocabulary)
        self._ids = {word: i + 4 for i, word in enumerate(self.vocabulary)}

    def __len__(self) -> int:
        return len(self.vocabulary) + 4

    def __call__(self, text: str, max_length: int) -> list[int]:
        words = [self._ids.get(word, 3) for word in text.lower().split()]
        return [1, *words[: max_length - 2], 2]


class HashTokenizer:
    """Any word to one of `buckets` ids by its checksum; for random models that have no vocabulary."""

    pad_id = 0
    pad_to_context = False

    def __init__(self, buckets: int) -> None:
        self.buckets = buckets

    def __len__(self) -> int:
        return self.buckets + 3

    def __call__(self, text: str, max_length: int) -> list[int]:
        words = [3 + zlib.crc32(word.encode()) % self.buckets for word in text.lower().split()]
        return [1, *words[: max_length - 2], 2]
