"""ALBEF (Li et al., NeurIPS 2021) and TCL (Yang et al., CVPR 2022), which is ALBEF with other weights.

A vision transformer, the lower half of a BERT on the text alone, the upper half on the text that looks at the image;
contrastive heads on the first tokens of both towers, a matching head on the first fused token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from fastmat.errors import UserError
from fastmat.models.albef_checkpoint import AlbefCheckpoint, AlbefSizes
from fastmat.models.fusion_bert import FusionEncoder, linear
from fastmat.models.hf_clip import CLIP_MEAN, CLIP_STD
from fastmat.models.protocol import (
    Encoded,
    FusionState,
    ImageState,
    TextState,
    TextTokens,
    Tokenizer,
    token_batch,
)
from fastmat.models.shifting import shifted
from fastmat.models.tokenizers import WordPieceTokenizer, read_bert_tokenizer
from fastmat.models.vit import VisionTransformer
from fastmat.models.weights import load_state, read_state
from fastmat.types import ImageTransform


class Albef(nn.Module):
    """Implements `fastmat.models.protocol.FusionModel`, with random weights.

    The first token of either state is its class token. temp: the temperature, whose inverse is the logit scale; it is
    the parameter that trains, as published.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, sizes: AlbefSizes, tokenizer: Tokenizer, context_length: int) -> None:
        super().__init__()
        self.image_tower = VisionTransformer(
            image_size=sizes.image_size,
            patch=sizes.patch,
            width=sizes.image_width,
            layers=sizes.image_layers,
            heads=sizes.image_heads,
            hidden=sizes.image_hidden,
        )
        self.image_projection: nn.Module = linear(sizes.image_width, sizes.embed_dim)
        self.text_tower = BertModel(
            BertConfig(
                vocab_size=sizes.vocabulary,
                max_position_embeddings=sizes.positions,
                hidden_size=sizes.text_width,
                num_hidden_layers=sizes.text_layers,
                num_attention_heads=sizes.text_heads,
                intermediate_size=sizes.text_hidden,
            ),
            add_pooling_layer=False,
        )
        self.text_projection: nn.Module = linear(sizes.text_width, sizes.embed_dim)
        self.fusion = FusionEncoder(
            layers=sizes.fusion_layers,
            width=sizes.text_width,
            heads=sizes.text_heads,
            hidden=sizes.text_hidden,
            image_width=sizes.image_width,
        )
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

    @property
    def token_embedding(self) -> nn.Embedding:
        embedding: nn.Embedding = self.text_tower.embeddings.word_embeddings
        return embedding

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

    def encode_text(self, tokens: TextTokens) -> TextState:
        with shifted(self.token_embedding, tokens.shift):
            hidden = self.text_tower(input_ids=tokens.ids, attention_mask=tokens.mask.long()).last_hidden_state
        embeds = self.text_projection(hidden[:, 0]).float()
        return TextState(tokens.ids, tokens.mask, hidden, embeds, F.normalize(embeds, dim=-1))

    def fuse(self, image: ImageState, text: TextState, owner: Tensor | None = None, maps: bool = False) -> FusionState:
        assert image.tokens is not None and text.tokens is not None
        tokens, attention = self.fusion(text.tokens, text.mask, image.tokens, owner, maps=maps)
        return FusionState(tokens, self.itm_head(tokens[:, 0]).float(), attention if maps else None)

    def forward(self, images: Tensor | None, tokens: TextTokens | None) -> Encoded:
        image = None if images is None else self.encode_image(images)
        text = None if tokens is None else self.encode_text(tokens)
        return Encoded(image, text, self.logit_scale)


def load_albef(
    checkpoint: Path | None = None,
    *,
    vocabulary: str = "google-bert/bert-base-uncased",
    image_size: int | None = None,
    image_heads: int = 12,
    text_heads: int = 12,
    context_length: int = 30,
    append_sep: bool = False,
) -> Albef:
    """ALBEF or TCL from an official checkpoint (`ALBEF.pth`, `flickr30k.pth`, `mscoco.pth`, TCL's), or without one.

    checkpoint: a torch or safetensors file in the official layout; momentum encoders, queues and the head of the masked
        language model in it are left alone. None: random weights in the published sizes.
    vocabulary: BERT's `vocab.txt`, a folder with a tokenizer, or a hub id. image_size: another resolution than the
        checkpoint's (random weights: 384); position embeddings are interpolated. image_heads, text_heads: attention
        heads, which no weight tells. context_length: tokens per caption. append_sep: whether [SEP] ends a caption; in
        the official code it does not.
    Raises UserError when a file is missing, carries code or is another model's, naming every key that does not match.
    """
    source = str(checkpoint)
    parts = None if checkpoint is None else AlbefCheckpoint.of(read_state(checkpoint), source=source)
    if parts is None:
        sizes = AlbefSizes(image_size=image_size or 384, image_heads=image_heads, text_heads=text_heads)
    else:
        parts = parts if image_size is None else parts.at(image_size)
        sizes = AlbefSizes.of(parts.model, image_heads=image_heads, text_heads=text_heads, source=source)
    if not 3 <= context_length <= sizes.positions:
        raise UserError(f"context_length must be between 3 and the model's {sizes.positions}, got {context_length}")
    bert = read_bert_tokenizer(vocabulary, size=sizes.vocabulary)
    tokenizer = WordPieceTokenizer(bert, append_sep=append_sep)
    model = Albef(sizes=sizes, tokenizer=tokenizer, context_length=context_length)
    if parts is not None:
        load_state(model, parts.model, source=source, most=None)
    return model
