"""Texts as a victim sees them: each distinct row of token ids is encoded once, without padding.

Rows of one length stand together. Where the text tower is causal, a variant of a caption is encoded from the first
position on at which it differs; what stands before comes from the caption, and is kept for the next search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastmat.errors import UserError
from fastmat.memory import Chunks
from fastmat.models.protocol import (
    ImageState,
    PrefixModel,
    TextPrefixes,
    TextState,
    VisionLanguageModel,
    has_prefixes,
    token_batch,
)
from fastmat.text.spelling import Ids, shared

Representation = Literal["features", "embeds", "tokens", "cls", "fusion"]
Parts = dict[Representation, Tensor]


def represent(state: TextState | ImageState, what: Representation) -> Tensor:
    """[T, D]: unit features, projected embeddings, all tokens (padding too) in one row, or the first token.

    "fusion" is of a text and an image together, never of one state (`fastmat.text.fused`).
    """
    if what == "features":
        return state.features
    if what == "embeds":
        return state.embeds
    assert what != "fusion"
    if state.tokens is None:
        tower = "image" if isinstance(state, ImageState) else "text"
        raise UserError(f"the {tower} tower gives no token sequence; use 'features' or 'embeds' instead of {what!r}")
    return state.tokens[:, 0] if what == "cls" else state.tokens.flatten(1)


class Base(NamedTuple):
    """A caption, its row among prefixes, and texts that begin like it."""

    row: int
    text: Ids
    variants: Sequence[Ids]


class EncodedTexts:
    """A growing table of representations. Texts of equal ids share a row, so their scores tie exactly.

    parts: what is kept of each text. length: ids per row when "tokens" is kept, which pads. tokens: positions per
    forward at most, all rows together; None: by device. Fewer when memory runs out.
    """

    def __init__(
        self, model: VisionLanguageModel, *, parts: Sequence[Representation], length: int, tokens: int | None = None
    ) -> None:
        self.model = model
        self.parts = tuple(dict.fromkeys(parts))
        self.length = length
        self.device = model.logit_scale.device
        tokens = tokens or (2048 if self.device.type == "cpu" else 1 << 16)  # on a CPU: what its cache holds
        self._forward = Chunks(tokens, item="text", advice="no smaller batch is left; take a smaller model or device")
        self._room = max(tokens, 8192)  # positions whose keys and values may be kept
        self._captions = Chunks(self._room, item="caption", advice="no smaller batch is left")
        self._prefixes: list[TextPrefixes] = []
        self._begun: dict[Ids, tuple[int, int]] = {}  # number of its prefixes, and row in them
        self._row: dict[Ids, int] = {}
        self._table: dict[Representation, Tensor] = {}

    def __len__(self) -> int:
        """Rows: texts encoded so far."""
        return len(self._row)

    @torch.no_grad()
    def __call__(self, texts: Sequence[Ids], *, base: Sequence[Ids] | None = None) -> dict[Representation, Tensor]:
        """Each part as [len(texts), D] on the model's device; encodes what has not been seen.

        base: for each text one that it begins like, if there is one. It changes how much is computed, not what.
        """
        if base is not None and has_prefixes(self.model) and not {"tokens", "cls"} & set(self.parts):
            self._encode_variants(self.model, self._unseen(dict(zip(texts, base, strict=True))))
        self._encode(sorted(self._unseen(dict.fromkeys(texts, ())), key=len))
        index = torch.tensor([self._row[text] for text in texts], device=self.device, dtype=torch.int64)
        return {part: self._table[part][index] for part in self.parts}

    def _unseen(self, texts: Mapping[Ids, Ids]) -> dict[Ids, Ids]:
        return {text: base for text, base in texts.items() if text not in self._row}

    def _encode(self, texts: Sequence[Ids]) -> None:
        """Whole rows, those of one length together."""
        model, tokenizer = self.model, self.model.tokenizer
        full = model.context_length if tokenizer.pad_to_context else self.length if "tokens" in self.parts else None
        rows: list[Parts] = []
        for length, group in groupby(texts, key=lambda text: full or len(text)):
            same = list(group)

            def work(start: int, stop: int, same: list[Ids] = same) -> Parts:
                tokens = token_batch(same[start:stop], pad_id=tokenizer.pad_id, length=full)
                return self._kept(model.encode_text(tokens.to(self.device)))

            rows += self._forward.run(len(same), work, cost=rows_of(length))
        self._add(texts, rows)

    def _encode_variants(self, model: PrefixModel, texts: Mapping[Ids, Ids]) -> None:
        """Variants of captions, from where they differ; nothing where the tower is not causal."""
        # Where an end token stands inside a text, the tower pools there and not at the last position.
        texts = {text: base for text, base in texts.items() if text[-1] not in text[:-1] and base[-1] not in base[:-1]}
        variants: dict[Ids, list[Ids]] = {base: [] for base in texts.values()}
        for text, base in texts.items():
            if text not in variants:
                variants[base].append(text)
        of_prefixes: dict[int, list[Base]] = {}
        for base in variants:
            if base in self._begun:
                number, row = self._begun[base]
                of_prefixes.setdefault(number, []).append(Base(row, base, variants[base]))
        for number, of in of_prefixes.items():
            self._add(*self._continued(model, self._prefixes[number], of))
        bases = sorted((base for base in variants if base not in self._begun), key=len)

        def work(start: int, stop: int) -> tuple[list[Ids], list[Parts]] | None:
            own = bases[start:stop]
            prefixes = model.text_prefixes(token_batch(own, pad_id=model.tokenizer.pad_id).to(self.device))
            if prefixes is None:
                return None
            # A caption's own row may be known, and stays as it is.
            whole = self._kept(prefixes.state)
            known = torch.tensor([base not in self._row for base in own], device=self.device)
            order, rows = self._continued(
                model, prefixes, [Base(n, base, variants[base]) for n, base in enumerate(own)]
            )
            fresh = [base for base in own if base not in self._row]
            positions = len(own) * len(own[-1])
            if positions <= self._room:  # the next search begins with the same captions
                self._room -= positions
                self._begun |= {base: (len(self._prefixes), n) for n, base in enumerate(own)}
                self._prefixes.append(prefixes)
            return [*fresh, *order], [{part: of[known] for part, of in whole.items()}, *rows]

        for found in self._captions.run(
            len(bases), work, cost=lambda start, stop: (stop - start) * len(bases[stop - 1])
        ):
            if found is not None:
                self._add(*found)

    def _continued(
        self, model: PrefixModel, prefixes: TextPrefixes, bases: Sequence[Base]
    ) -> tuple[list[Ids], list[Parts]]:
        """The variants of each base in the order in which they were encoded, and their rows."""
        todo = []
        for row, base, variants in bases:
            for text in variants:
                start = min(shared(text, base), len(text) - 1)
                todo.append((len(text) - start, start, row, text))
        todo.sort(key=itemgetter(0, 1))
        rows: list[Parts] = []
        for length, group in groupby(todo, key=itemgetter(0)):
            same = list(group)

            def work(first: int, stop: int, same: list[tuple[int, int, int, Ids]] = same) -> Parts:
                chunk = same[first:stop]
                owner = torch.tensor([row for _, _, row, _ in chunk], device=self.device)
                start = torch.tensor([start for _, start, _, _ in chunk], device=self.device)
                ids = torch.tensor([text[start:] for _, start, _, text in chunk], device=self.device)
                return self._kept(model.continue_text(prefixes, owner, start, ids))

            rows += self._forward.run(len(same), work, cost=rows_of(length))
        return [text for _, _, _, text in todo], rows

    def _kept(self, state: TextState) -> Parts:
        return {part: represent(state, part) for part in self.parts}

    def _add(self, texts: Sequence[Ids], rows: Sequence[Parts]) -> None:
        """Rows of texts that have none yet, in their order."""
        for text in texts:
            self._row[text] = len(self._row)
        if texts:
            for part in self.parts:
                known = [self._table[part]] if part in self._table else []
                self._table[part] = torch.cat([*known, *(of[part] for of in rows)])


def rows_of(length: int) -> Callable[[int, int], int]:
    """Positions of rows start:stop that are all of one length."""
    return lambda start, stop: (stop - start) * length
