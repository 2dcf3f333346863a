"""The one dual encoder: two towers, two replaceable projections, a tokenizer and an image rule, behind the protocol.

A model family is a file that takes a library's model apart into these pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmat.models.causal import CausalTower
from fastmat.models.protocol import (
    Encoded,
    ImageState,
    TextPrefixes,
    TextState,
    TextTokens,
    Tokenizer,
    token_batch,
)
from fastmat.models.sharding import whole
from fastmat.models.shifting import shifted
from fastmat.types import ImageTransform


class DualEncoder(nn.Module):
    """Implements `fastmat.models.protocol.VisionLanguageModel`.

    image_tower: normalised [B, 3, H, W] -> (pooled [B, W], tokens [B, N, D] or None).
    text_tower: ids [T, L], mask [T, L] -> (pooled [T, W], tokens [T, L, D] or None).
    image_projection, text_projection: pooled -> embeds; replaceable.
    log_logit_scale: scalar parameter, the logarithm of the multiplier.
    mean, std: per-channel normalisation of images in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        image_tower: nn.Module,
        image_projection: nn.Module,
        text_tower: nn.Module,
        text_projection: nn.Module,
        log_logit_scale: nn.Parameter,
        tokenizer: Tokenizer,
        context_length: int,
        image_transform: ImageTransform,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.image_tower = image_tower
        self.image_projection = image_projection
        self.text_tower = text_tower
        self.text_projection = text_projection
        self.log_logit_scale = log_logit_scale
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.image_transform = image_transform
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def logit_scale(self) -> Tensor:
        return self.log_logit_scale.exp()

    @property
    def token_embedding(self) -> nn.Embedding | None:
        return getattr(self.text_tower, "token_embedding", None)

    def tokenize(self, texts: Sequence[str], *, max_length: int | None = None, pad: bool = False) -> TextTokens:
        limit = self.context_length if max_length is None else min(max_length, self.context_length)
        rows = [self.tokenizer(text, limit) for text in texts]
        length = self.context_length if self.tokenizer.pad_to_context else limit if pad else None
        return token_batch(rows, pad_id=self.tokenizer.pad_id, length=length)

    def encode_image(self, images: Tensor) -> ImageState:
        size = self.image_transform.size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=True)
        pooled, tokens = self.image_tower((images - self.mean) / self.std)
        embeds = self.image_projection(pooled).float()
        return ImageState(tokens, embeds, F.normalize(embeds, dim=-1))

    def encode_text(self, tokens: TextTokens) -> TextState:
        with shifted(self.token_embedding, tokens.shift):
            pooled, sequence = self.text_tower(tokens.ids, tokens.mask)
        embeds = self.text_projection(pooled).float()
        return TextState(tokens.ids, tokens.mask, sequence, embeds, F.normalize(embeds, dim=-1))

    def text_prefixes(self, tokens: TextTokens) -> TextPrefixes | None:
        tower = self._causal_tower() if whole(self.text_tower) else None
        if tower is None:
            return None
        pooled, keys, values = tower.prefixes(tokens.ids, tokens.mask.sum(1))
        return TextPrefixes(self._text_state(tokens, pooled), keys, values)

    def continue_text(self, prefixes: TextPrefixes, owner: Tensor, start: Tensor, ids: Tensor) -> TextState:
        tower = self._causal_tower()
        assert tower is not None
        pooled = tower.continued(prefixes.keys, prefixes.values, owner, start, ids)
        return self._text_state(TextTokens(ids, torch.ones_like(ids, dtype=torch.bool)), pooled)

    def _causal_tower(self) -> CausalTower | None:
        causal = getattr(self.text_tower, "causal", None)
        return None if causal is None else causal()

    def _text_state(self, tokens: TextTokens, pooled: Tensor) -> TextState:
        embeds = self.text_projection(pooled).float()
        return TextState(tokens.ids, tokens.mask, None, embeds, F.normalize(embeds, dim=-1))

    def forward(self, images: Tensor | None, tokens: TextTokens | None) -> Encoded:
        image = None if images is None else self.encode_image(images)
        text = None if tokens is None else self.encode_text(tokens)
        return Encoded(image, text, self.logit_scale)
