"""Texts as a fusion model sees them: beside their image. Each distinct pair is fused once.

Pairs of one image stand together, so that what is computed of an image alone is computed once for many texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmat.memory import Chunks
from fastmat.models.protocol import FusionModel, ImageState, token_batch
from fastmat.text.encoded import Representation
from fastmat.text.spelling import Ids


class FusedTexts:
    """A growing table of fused class tokens, as `EncodedTexts` is one of texts alone.

    image: images, encoded once; owner: for each caption the row of its image. positions: of texts and of the images
    beside them, per forward at most; None: by device. Fewer when memory runs out.
    """

    parts: tuple[Representation, ...] = ("fusion",)

    def __init__(
        self, model: FusionModel, image: ImageState, owner: Sequence[int], *, positions: int | None = None
    ) -> None:
        self.model = model
        self.image = image
        self.owner = owner
        self.device = image.embeds.device
        limit = positions or (1 << 14 if self.device.type == "cpu" else 1 << 17)
        self._forward = Chunks(limit, item="text", advice="no smaller batch is left; take a smaller model or device")
        self._row: dict[tuple[int, Ids], int] = {}
        self._table: Tensor | None = None

    def __len__(self) -> int:
        """Rows: pairs fused so far."""
        return len(self._row)

    @torch.no_grad()
    def __call__(self, texts: Sequence[Ids], captions: Sequence[int]) -> dict[Representation, Tensor]:
        """{"fusion": [len(texts), D]}: text n beside the image of caption `captions[n]`."""
        pairs = [(self.owner[caption], text) for text, caption in zip(texts, captions, strict=True)]
        self._fuse(sorted({pair for pair in pairs if pair not in self._row}, key=lambda pair: (pair[0], len(pair[1]))))
        index = torch.tensor([self._row[pair] for pair in pairs], device=self.device, dtype=torch.int64)
        assert self._table is not None
        return {"fusion": self._table[index]}

    def _fuse(self, pairs: Sequence[tuple[int, Ids]]) -> None:
        """Pairs in the order of their images."""
        if not pairs:
            return
        assert self.image.tokens is not None
        positions = self.image.tokens.shape[1] + max(len(text) for _, text in pairs)

        def work(start: int, stop: int) -> Tensor:
            first, last = pairs[start][0], pairs[stop - 1][0]
            tokens = token_batch([text for _, text in pairs[start:stop]], pad_id=self.model.tokenizer.pad_id)
            owner = torch.tensor([image - first for image, _ in pairs[start:stop]], device=self.device)
            text = self.model.encode_text(tokens.to(self.device))
            return self.model.fuse(rows(self.image, first, last + 1), text, owner).tokens[:, 0]

        found = self._forward.run(len(pairs), work, cost=lambda start, stop: (stop - start) * positions)
        for pair in pairs:
            self._row[pair] = len(self._row)
        self._table = torch.cat([*([] if self._table is None else [self._table]), *found])


def rows(image: ImageState, start: int, stop: int) -> ImageState:
    """The images start:stop."""
    tokens = None if image.tokens is None else image.tokens[start:stop]
    return ImageState(tokens, image.embeds[start:stop], image.features[start:stop])
