"""Word vectors from disk: the text files of GloVe and word2vec, or a safetensors matrix with its words beside it."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastmat.errors import UserError


def read_vectors(path: Path) -> tuple[list[str], Tensor]:
    """Words, and their unit vectors [V, D] fp32; a word that comes twice counts once, a zero vector not at all.

    path: "word v1 ... vD" per line, with or without word2vec's first line "V D", gzipped if it ends in .gz.
        Or FILE.safetensors with one matrix [V, D] and FILE.txt with a word per row, which opens much faster.
    Raises UserError, in one sentence that names the file, for one that is missing, damaged or holds something else.
    """
    path = Path(path)
    try:
        words, vectors = read_matrix(path) if path.suffix == ".safetensors" else read_text(path)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"word vectors {path} cannot be read ({reason}); give a file of GloVe or word2vec") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"word vectors {path} are no UTF-8 text ({error.reason}); convert them to word2vec's text format"
        ) from error
    if not bool(vectors.isfinite().all()):
        raise UserError(f"word vectors {path} hold NaN or infinity; fetch or convert them anew")
    rows: dict[str, int] = {}
    present = vectors.any(1).tolist()
    for row, word in enumerate(words):
        if present[row]:
            rows.setdefault(word, row)
    if not rows:
        raise UserError(f"word vectors {path} hold no word with a vector; give a file of GloVe or word2vec")
    if len(rows) < len(vectors):
        vectors = vectors[list(rows.values())]
    return list(rows), F.normalize(vectors.float(), dim=1)


def read_text(path: Path) -> tuple[list[str], Tensor]:
    words: list[str] = []
    numbers = bytearray()  # one growing block: a list of arrays would be in memory twice
    size = 0
    opened = gzip.open if path.suffix == ".gz" else open
    # Lines end with a line feed alone: other separators occur within words.
    with opened(path, "rt", encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip(" \r\n").split(" ")
            header = number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields)
            if header or fields == [""]:
                continue
            size = size or len(fields) - 1
            try:
                vector = np.array(fields[-size:] if size else [], dtype=np.float32)
            except ValueError:
                vector = np.empty(0, dtype=np.float32)
            if not size or len(vector) < size or len(fields) <= size:
                raise UserError(
                    f"word vectors {path} must hold a word and {size or 'its'} numbers in every line, but line "
                    f"{number} begins {line[:40]!r}; give a text file of GloVe or word2vec"
                )
            words.append(" ".join(fields[:-size]))  # some of GloVe's words have blanks inside
            numbers += vector.tobytes()
    return words, torch.frombuffer(numbers, dtype=torch.float32).view(-1, size) if words else torch.empty(0, 1)


def read_matrix(path: Path) -> tuple[list[str], Tensor]:
    try:
        tensors = list(load_file(path).values())
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy or make it again") from error
    beside = path.with_suffix(".txt")
    words = beside.read_bytes().decode("utf-8").removesuffix("\n").split("\n") if beside.exists() else []
    if len(tensors) != 1 or tensors[0].dim() != 2 or not tensors[0].is_floating_point():
        raise UserError(f"word vectors {path} must hold one matrix of floats, a row per word, and nothing else")
    if len(words) != len(tensors[0]):
        raise UserError(
            f"word vectors {path} have {len(tensors[0])} rows, but {beside} names {len(words)} words; "
            "write one word per line, in the order of the rows"
        )
    return words, tensors[0]
