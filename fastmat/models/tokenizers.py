"""Tokenizers of the model families, one caption at a time, without padding."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from fastmat.errors import UserError
from fastmat.models.protocol import encodable

if TYPE_CHECKING:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
    from transformers import BertTokenizerFast

# Printable ASCII is tokenised word by word. An ampersand may begin an entity, and clean-up looks at the text around it.
PLAIN = re.compile(r"[!-%'-~]*")


def is_plain(word: str) -> bool:
    """Whether no clean-up of a tokenizer changes the word or looks beyond it.

    >>> is_plain("dog's"), is_plain("&amp;"), is_plain("caf\u00e9")
    (True, False, False)
    """
    return PLAIN.fullmatch(word) is not None


class ClipTokenizer:
    """CLIP's byte-pair encoding: start, pieces, end; a caption that is too long keeps its end token."""

    pad_id = 0
    pad_to_context = False

    def __init__(self, bpe: SimpleTokenizer) -> None:
        self.bpe = bpe
        self._encode = lru_cache(maxsize=1 << 16)(self.bpe.encode)  # the same captions come back at every pass

    def __call__(self, text: str, max_length: int) -> list[int]:
        return self.frame(self._encode(text), max_length)

    def word(self, word: str) -> tuple[int, ...] | None:
        return tuple(self._encode(word)) if is_plain(word) else None

    def frame(self, ids: Sequence[int], max_length: int) -> list[int]:
        return [self.bpe.sot_token_id, *ids[: max_length - 2], self.bpe.eot_token_id]


class HubTokenizer:
    """A transformers tokenizer as open_clip wraps it."""

    def __init__(self, wrapped: HFTokenizer, *, context_length: int) -> None:
        self.wrapped = wrapped
        self.context_length = context_length
        self.pad_id: int = wrapped.tokenizer.pad_token_id or 0
        self.pad_to_context = True

    def __call__(self, text: str, max_length: int) -> list[int]:
        ids = self.wrapped([encodable(text)], context_length=max_length)[0].tolist()
        while ids and ids[-1] == self.pad_id:
            ids.pop()
        return ids

    def word(self, word: str) -> tuple[int, ...] | None:
        return None  # any tokenizer of the hub: nothing is known of it

    def frame(self, ids: Sequence[int], max_length: int) -> list[int]:
        raise NotImplementedError("no word has ids of its own")


class WordPieceTokenizer:
    """BERT's: `[CLS] pieces [SEP]`, or without [SEP] as ALBEF's bundled tokenizer has it."""

    pad_to_context = False

    def __init__(self, bert: BertTokenizerFast, *, append_sep: bool = True) -> None:
        self.pad_id: int = bert.pad_token_id
        self._start: int = bert.cls_token_id
        self._end = [bert.sep_token_id] if append_sep else []
        backend = bert.backend_tokenizer
        self._encode = lru_cache(maxsize=1 << 16)(
            lambda text: tuple(backend.encode(encodable(text), add_special_tokens=False).ids)
        )

    def __call__(self, text: str, max_length: int) -> list[int]:
        return self.frame(self._encode(text), max_length)

    def word(self, word: str) -> tuple[int, ...] | None:
        return self._encode(word) if is_plain(word) else None

    def frame(self, ids: Sequence[int], max_length: int) -> list[int]:
        return [self._start, *ids[: max_length - 1 - len(self._end)], *self._end]


def read_bert_tokenizer(source: str, *, size: int, added: int = 0) -> BertTokenizerFast:
    """BERT's lower-casing tokenizer from a `vocab.txt`, a folder or a hub id.

    size: pieces that the model knows; added: how many of them, the last, are no words and may be missing.
    Raises UserError when there is none or it is another model's.
    """
    from transformers import BertTokenizerFast

    path = Path(source)
    if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise UserError(f"vocabulary: {source} has neither tokenizer.json nor vocab.txt")
    try:
        bert = BertTokenizerFast(vocab=source) if path.is_file() else BertTokenizerFast.from_pretrained(source)
    except Exception as error:  # the hub and the tokenizer's file each raise their own
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"vocabulary: no BERT tokenizer in {source!r} ({line}); give a vocab.txt, a folder or a hub id"
        ) from error
    if len(bert) not in (size, size - added):
        raise UserError(
            f"vocabulary: {source} has {len(bert)} pieces, the model {size}; give the one it was trained with"
        )
    return bert


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
        return self.frame(self._encode(text), max_length)

    def word(self, word: str) -> tuple[int, ...] | None:
        return self._encode(word) if is_plain(word) else None

    def frame(self, ids: Sequence[int], max_length: int) -> list[int]:
        return [1, *ids[: max_length - 2], 2]

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._ids.get(word, 3) for word in text.lower().split())


class HashTokenizer:
    """Any word to one of `buckets` ids by its checksum; for random models that have no vocabulary."""

    pad_id = 0
    pad_to_context = False

    def __init__(self, buckets: int) -> None:
        self.buckets = buckets

    def __len__(self) -> int:
        return self.buckets + 3

    def __call__(self, text: str, max_length: int) -> list[int]:
        return self.frame(self._encode(text), max_length)

    def word(self, word: str) -> tuple[int, ...] | None:
        return self._encode(word) if is_plain(word) else None

    def frame(self, ids: Sequence[int], max_length: int) -> list[int]:
        return [1, *ids[: max_length - 2], 2]

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(3 + zlib.crc32(encodable(word).encode()) % self.buckets for word in text.lower().split())
