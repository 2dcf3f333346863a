"""A small fusion model that trains in a minute on two cores: the towers of `small_clip` under the heads of ALBEF."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmat.models.fusion_checkpoint import FusionSizes
from fastmat.models.matcher import Matcher, fusion_of
from fastmat.models.protocol import TextState, TextTokens, Tokenizer
from fastmat.models.shifting import shifted
from fastmat.models.small import ConvTower, WordTower
from fastmat.models.tokenizers import HashTokenizer, WordTokenizer


def scale_to_width(*modules: nn.Module) -> None:
    """Redraw linear weights: BERT's standard deviation is meant for its width, in a narrow layer nothing would pass."""
    for part in modules:
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)


class GridTower(nn.Module):
    """Convolutions to tokens [B, 1 + cells, W]: the whole grid as the class token, then its cells."""

    def __init__(self, *, image_size: int, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.grid = ConvTower(image_size=image_size, widths=widths)
        self.whole = nn.Linear(self.grid.width, width)
        self.cell = nn.Linear(widths[-1], width)
        self.position = nn.Parameter(torch.randn(1 + self.grid.width // widths[-1], width) * 0.02)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        flat, cells = self.grid(images)
        tokens: Tensor = self.norm(torch.cat((self.whole(flat)[:, None], self.cell(cells)), 1) + self.position)
        return tokens


class SmallFusion(Matcher):
    """Implements `fastmat.models.protocol.FusionModel`. Its towers begin to learn at once, without pre-training, where
    those of ALBEF wait for thousands of steps; fusion and heads are ALBEF's."""

    ranks_with_cosine = False
    rereads_text = False

    def __init__(self, *, sizes: FusionSizes, widths: Sequence[int], tokenizer: Tokenizer, context_length: int) -> None:
        tower = GridTower(image_size=sizes.image_size, widths=widths, width=sizes.image_width)
        super().__init__(sizes=sizes, tokenizer=tokenizer, context_length=context_length, image_tower=tower)
        self.text_tower = WordTower(
            vocabulary_size=sizes.vocabulary,
            context_length=context_length,
            width=sizes.text_width,
            layers=sizes.text_layers,
            heads=sizes.text_heads,
        )
        self.fusion = fusion_of(sizes, dropout=0.0)
        scale_to_width(self.fusion, self.image_projection, self.text_projection)

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.text_tower.token_embedding

    def encode_tokens(self, tokens: TextTokens) -> Tensor:
        with shifted(self.token_embedding, tokens.shift):
            pooled, hidden = self.text_tower(tokens.ids, tokens.mask)
        return torch.cat((pooled[:, None], hidden[:, 1:]), 1)

    def fusion_input(self, text: TextState) -> Tensor:
        assert text.tokens is not None
        return text.tokens


def small_fusion(
    *,
    vocabulary: Sequence[str] | None,
    image_size: int = 32,
    widths: Sequence[int] = (24, 48, 96),
    width: int = 96,
    layers: int = 2,
    fusion_layers: int = 2,
    heads: int = 4,
    embed_dim: int = 64,
    context_length: int = 24,
    seed: int = 0,
) -> SmallFusion:
    """A randomly initialised small model, seeded without touching the global random state.

    vocabulary: words with an id of their own, others are unknown; None: all words are hashed into 64 ids.
    image_size: pixels a side. widths: channels of each convolution. width: of image tokens, words and fusion.
    layers, fusion_layers: of the text and of the fusion, both with `heads`. embed_dim: of image and text embeddings.
    context_length: words per caption, with start and end.
    """
    tokenizer = HashTokenizer(64) if vocabulary is None else WordTokenizer(vocabulary)
    sizes = FusionSizes(
        image_size=image_size,
        patch=2 ** len(widths),
        image_width=width,
        image_layers=1,
        image_heads=heads,
        image_hidden=width,
        vocabulary=len(tokenizer),
        positions=context_length,
        text_width=width,
        text_layers=layers,
        fusion_layers=fusion_layers,
        text_heads=heads,
        text_hidden=2 * width,
        embed_dim=embed_dim,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallFusion(sizes=sizes, widths=widths, tokenizer=tokenizer, context_length=context_length)
