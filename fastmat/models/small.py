"""A small dual encoder that trains in a minute on two cores: convolutions for images, a short transformer for words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.tokenizers import HashTokenizer, WordTokenizer
from fastmat.types import ImageTransform


class ConvTower(nn.Module):
    """Convolutions that each halve the resolution, the first 5x5, the others 3x3; the last grid is flattened, so that
    where things stand is kept. tokens are the cells of that grid."""

    def __init__(self, *, image_size: int, widths: Sequence[int]) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        previous = 3
        for i, width in enumerate(widths):
            kernel = 5 if i == 0 else 3
            blocks += [
                nn.Conv2d(previous, width, kernel, 2, kernel // 2, bias=False),
                nn.GroupNorm(4, width),
                nn.ReLU(),
            ]
            previous = width
        self.blocks = nn.Sequential(*blocks)
        self.width = previous * math.ceil(image_size / 2 ** len(widths)) ** 2

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        grid = self.blocks(images)
        return grid.flatten(1), grid.flatten(2).transpose(1, 2)


class WordTower(nn.Module):
    """A bidirectional transformer over word embeddings, pooled by the mean over words."""

    def __init__(self, *, vocabulary_size: int, context_length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.width = width

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        tokens = self.norm(self.layers(x, src_key_padding_mask=~mask))
        kept = mask.unsqueeze(-1).to(tokens)
        return (tokens * kept).sum(1) / kept.sum(1), tokens


def small_clip(
    *,
    vocabulary: Sequence[str] | None,
    image_size: int = 32,
    widths: Sequence[int] = (32, 64, 128),
    text_width: int = 96,
    layers: int = 2,
    heads: int = 4,
    embed_dim: int = 128,
    context_length: int = 24,
    seed: int = 0,
) -> DualEncoder:
    """A randomly initialised small model, seeded without touching the global random state.

    vocabulary: words with an id of their own, others are unknown; None: all words are hashed into 64 ids.
    image_size: pixels a side. widths: channels of each convolution. text_width, layers, heads: the word transformer.
    embed_dim: of image and text embeddings. context_length: words per caption, with start and end.
    """
    tokenizer = HashTokenizer(64) if vocabulary is None else WordTokenizer(vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images = ConvTower(image_size=image_size, widths=widths)
        texts = WordTower(
            vocabulary_size=len(tokenizer), context_length=context_length, width=text_width, layers=layers, heads=heads
        )
        return DualEncoder(
            image_tower=images,
            image_projection=nn.Linear(images.width, embed_dim, bias=False),
            text_tower=texts,
            text_projection=nn.Linear(texts.width, embed_dim, bias=False),
            log_logit_scale=nn.Parameter(torch.tensor(math.log(1 / 0.07))),
            tokenizer=tokenizer,
            context_length=context_length,
            image_transform=ImageTransform(size=image_size),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )
