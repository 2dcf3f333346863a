"""Texts as a victim sees them: each distinct row of token ids is encoded once, in length-sorted chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from fastmat.errors import UserError
from fastmat.models.protocol import TextState, TextTokens, VisionLanguageModel

Representation = Literal["features", "embeds", "tokens", "cls"]


def represent(state: TextState, what: Representation) -> Tensor:
    """[T, D]: unit features, projected embeddings, all tokens (padding too) in one row, or the first token."""
    if what == "features":
        return state.features
    if what == "embeds":
        return state.embeds
    if state.tokens is None:
        raise UserError(f"the text tower gives no token sequence; use 'features' or 'embeds' instead of {what!r}")
    return state.tokens[:, 0] if what == "cls" else state.tokens.flatten(1)


class EncodedTexts:
    """A growing table of representations.

    Texts of equal ids (duplicates, words beyond the context, letter case) share a row, so their scores tie exactly.

    parts: what is kept of each text. prepare: what is done to a text before the victim's tokenizer.
    max_length: ids per text, None: the victim's context. chunk: texts per forward.
    """

    def __init__(
        self,
        *,
        parts: Sequence[Representation],
        chunk: int,
        max_length: int | None = None,
        prepare: Callable[[str], str] = str,
    ) -> None:
        self.parts = tuple(dict.fromkeys(parts))
        self.chunk = chunk
        self.max_length = max_length
        self.prepare = prepare
        self._row: dict[str, int] = {}
        self._row_of_ids: dict[bytes, int] = {}
        self._table: dict[Representation, Tensor] = {}

    def __len__(self) -> int:
        """Rows: texts encoded so far."""
        return len(self._row_of_ids)

    @torch.no_grad()
    def __call__(self, model: VisionLanguageModel, texts: Sequence[str]) -> dict[Representation, Tensor]:
        """Each part as [len(texts), D] on the model's device; encodes what has not been seen."""
        new = sorted(dict.fromkeys(text for text in texts if text not in self._row), key=len)
        fresh: dict[Representation, list[Tensor]] = {part: [] for part in self.parts}
        for start in range(0, len(new), self.chunk):
            state = self._encode(model, new[start : start + self.chunk])
            if state is not None:
                for part in self.parts:
                    fresh[part].append(represent(state, part))
        for part, rows in fresh.items():
            if rows:
                known = [self._table[part]] if part in self._table else []
                self._table[part] = torch.cat([*known, *rows])
        index = torch.tensor([self._row[text] for text in texts], device=model.logit_scale.device, dtype=torch.int64)
        return {part: self._table[part][index] for part in self.parts}

    def _encode(self, model: VisionLanguageModel, texts: Sequence[str]) -> TextState | None:
        """Numbers the rows of `texts` and encodes those whose ids are new."""
        tokens = model.tokenize(
            [self.prepare(text) for text in texts], max_length=self.max_length, pad="tokens" in self.parts
        )
        keep = []
        for n, (text, ids, length) in enumerate(zip(texts, tokens.ids, tokens.mask.sum(1).tolist(), strict=True)):
            key = ids[:length].numpy().tobytes()
            if key not in self._row_of_ids:
                self._row_of_ids[key] = len(self._row_of_ids)
                keep.append(n)
            self._row[text] = self._row_of_ids[key]
        if not keep:
            return None
        return model.encode_text(TextTokens(tokens.ids[keep], tokens.mask[keep]).to(model.logit_scale.device))
