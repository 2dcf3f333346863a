"""What ALBEF and BLIP share: a vision transformer, heads for contrast and for matching, a temperature, a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmat.errors import UserError
from fastmat.models.fusion_bert import FusionEncoder, linear
from fastmat.models.fusion_checkpoint import FusionSizes
from fastmat.models.hf_clip import CLIP_MEAN, CLIP_STD
from fastmat.models.packed import first_fused, keys_of_images, pack_texts
from fastmat.models.protocol import (
    Encoded,
    FusionState,
    ImageKeys,
    ImageState,
    PackedTexts,
    TextState,
    TextTokens,
    Tokenizer,
    token_batch,
)
from fastmat.models.vit import VisionTransformer
from fastmat.types import ImageTransform


def fusion_of(sizes: FusionSizes, *, dropout: float = 0.1) -> FusionEncoder:
    """With random weights; dropout: BERT's."""
    return FusionEncoder(
        layers=sizes.fusion_layers,
        width=sizes.text_width,
        heads=sizes.text_heads,
        hidden=sizes.text_hidden,
        image_width=sizes.image_width,
        dropout=dropout,
    )


class Matcher(nn.Module):
    """With random weights. A model adds its text encoder, `encode_tokens`; the `fusion` and what enters it,
    `fusion_input`; `ranks_with_cosine` and `rereads_text`. That makes it a `fastmat.models.protocol.FusionModel`.

    The first token of every state is its class token. temp: the temperature, whose inverse is the logit scale; it is
    the parameter that trains, as published.
    image_tower: normalised [B, 3, H, W] to tokens [B, N, D]; None: a vision transformer of these sizes.
    Raises UserError for a context_length that the text encoder has not.
    """

    mean: Tensor
    std: Tensor
    fusion: FusionEncoder
    ranks_with_cosine: bool
    rereads_text: bool

    def __init__(
        self,
        *,
        sizes: FusionSizes,
        tokenizer: Tokenizer,
        context_length: int,
        image_tower: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not 3 <= context_length <= sizes.positions:
            raise UserError(f"context_length must be between 3 and the model's {sizes.positions}, got {context_length}")
        self.image_tower = image_tower or VisionTransformer(
            image_size=sizes.image_size,
            patch=sizes.patch,
            width=sizes.image_width,
            layers=sizes.image_layers,
            heads=sizes.image_heads,
            hidden=sizes.image_hidden,
        )
        self.image_projection: nn.Module = linear(sizes.image_width, sizes.embed_dim)
        self.text_projection: nn.Module = linear(sizes.text_width, sizes.embed_dim)
        self.itm_head = linear(sizes.text_width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.sizes = sizes
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.image_transform = ImageTransform(size=sizes.image_size)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1), persistent=False)

    @property
    def logit_scale(self) -> Tensor:
        return 1 / self.temp

    def tokenize(self, texts: Sequence[str], *, max_length: int | None = None, pad: bool = False) -> TextTokens:
        limit = self.context_length if max_length is None else min(max_length, self.context_length)
        rows = [self.tokenizer(text, limit) for text in texts]
        return token_batch(rows, pad_id=self.tokenizer.pad_id, length=limit if pad else None)

    def encode_image(self, images: Tensor) -> ImageState:
        size = self.image_transform.size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=True)
        tokens = self.image_tower((images - self.mean) / self.std)
        embeds = self.image_projection(tokens[:, 0]).float()
        return ImageState(tokens, embeds, F.normalize(embeds, dim=-1))

    def encode_tokens(self, tokens: TextTokens) -> Tensor:
        """The text alone, [T, L, D]."""
        raise NotImplementedError

    def fusion_input(self, text: TextState) -> Tensor:
        """The texts as they enter the fusion, [T, L, D]."""
        raise NotImplementedError

    def encode_text(self, tokens: TextTokens) -> TextState:
        hidden = self.encode_tokens(tokens)
        embeds = self.text_projection(hidden[:, 0]).float()
        return TextState(tokens.ids, tokens.mask, hidden, embeds, F.normalize(embeds, dim=-1))

    def fuse(self, image: ImageState, text: TextState, owner: Tensor | None = None, maps: bool = False) -> FusionState:
        assert image.tokens is not None
        tokens, attention = self.fusion(self.fusion_input(text), text.mask, image.tokens, owner, maps=maps)
        return FusionState(tokens, self.itm_head(tokens[:, 0]).float(), attention if maps else None)

    def image_keys(self, image_tokens: Tensor) -> ImageKeys:
        return keys_of_images(self.fusion, image_tokens)

    def pack_texts(self, text: TextState) -> PackedTexts:
        assert not self.training
        return pack_texts(self.fusion, self.fusion_input(text), text.mask)

    def match(self, image: ImageKeys, texts: PackedTexts) -> Tensor:
        assert not self.training
        logits: Tensor = self.itm_head(first_fused(self.fusion, image, texts)).float()
        return logits

    def forward(self, images: Tensor | None, tokens: TextTokens | None) -> Encoded:
        image = None if images is None else self.encode_image(images)
        text = None if tokens is None else self.encode_text(tokens)
        return Encoded(image, text, self.logit_scale)
