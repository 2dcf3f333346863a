"""BERT layers whose text looks at an image (ALBEF, NeurIPS 2021; BLIP, ICML 2022).

Written out, because transformers' layer neither takes keys and values that are already there nor gives its attention:
an image's keys and values are computed once, however many texts look at it, and the maps are what Grad-CAM reads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12
INIT_STD = 0.02
# What BERT's checkpoints call the parts of a layer, in the order of replacement.
BERT_NAMES = {
    "attention.self.": "attention.",
    "attention.output.dense.": "attention.merge.",
    "attention.output.LayerNorm.": "attention.norm.",
    "intermediate.dense.": "feed_forward.grow.",
    "output.dense.": "feed_forward.merge.",
    "output.LayerNorm.": "feed_forward.norm.",
}


class FusionEncoder(nn.Module):
    """`layers` layers of self-attention, cross-attention to image tokens [N, image_width], and feed-forward.

    width, heads, hidden: of the text. dropout: of attention and of each residual, in training.
    """

    def __init__(
        self, *, layers: int, width: int, heads: int, hidden: int, image_width: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(width, heads, hidden, image_width, dropout) for _ in range(layers))

    def forward(
        self, x: Tensor, mask: Tensor, image_tokens: Tensor | None, owner: Tensor | None = None, *, maps: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Fused tokens [P, L, W], and with `maps` the cross-attention [P, H, L, N] of every layer.

        x [P, L, W], mask [P, L] bool: the texts. image_tokens [B, N, D], None: the texts alone, as BLIP encodes them;
        owner [P]: the image row of each text, None: the text's own row.
        """
        seen, found = mask[:, None, None], []
        for layer in self.layers:
            x, attended = layer(x, seen, image_tokens, owner, maps=maps)
            found.append(attended)
        return x, tuple(found) if maps else ()


class FusionLayer(nn.Module):
    """A layer of BERT, post-norm, with cross-attention between the other two."""

    def __init__(self, width: int, heads: int, hidden: int, image_width: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, width, dropout)
        self.crossattention = Attention(width, heads, image_width, dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(
        self, x: Tensor, seen: Tensor, image_tokens: Tensor | None, owner: Tensor | None, *, maps: bool
    ) -> tuple[Tensor, Tensor | None]:
        x, _ = self.attention(x, *self.attention.keys_values(x), seen)
        if image_tokens is None:
            return self.feed_forward(x), None
        keys, values = self.crossattention.keys_values(image_tokens)
        if owner is not None:
            keys, values = keys[owner], values[owner]
        x, attended = self.crossattention(x, keys, values, maps=maps)
        return self.feed_forward(x), attended


class Attention(nn.Module):
    """norm(x + merge(attention of x [P, L, W] to a source [N, S, source_width]))."""

    def __init__(self, width: int, heads: int, source_width: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = linear(width, width)
        self.key = linear(source_width, width)
        self.value = linear(source_width, width)
        self.merge = linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = dropout

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """[N, S, D] to keys and values [N, H, S, W / H]."""
        return self.heads_of(self.key(source)), self.heads_of(self.value(source))

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None, *, maps: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """seen: which positions of the source may be attended to, broadcast to [P, H, L, S]; None: all. maps: also give
        the attention, in the graph."""
        query, dropped = self.heads_of(self.query(x)), self.dropout if self.training else 0.0
        weights = None
        if maps:
            assert seen is None
            weights = (query @ keys.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
            attended = F.dropout(weights, dropped) @ values
        else:
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, dropout_p=dropped)
        merged = self.merge(attended.transpose(1, 2).flatten(2))
        return self.norm(x + F.dropout(merged, dropped)), weights

    def heads_of(self, x: Tensor) -> Tensor:
        """[N, S, W] to [N, H, S, W / H]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """norm(x + merge(gelu(grow(x))))."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.grow = linear(width, hidden)
        self.merge = linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        grown = self.merge(F.gelu(self.grow(x)))
        return self.norm(x + F.dropout(grown, self.dropout, self.training))


def linear(inputs: int, outputs: int) -> nn.Linear:
    """As BERT begins: normal weights, no bias."""
    made = nn.Linear(inputs, outputs)
    nn.init.normal_(made.weight, std=INIT_STD)
    nn.init.zeros_(made.bias)
    return made


def layer_key(key: str) -> str:
    """A BERT layer's key as `FusionLayer` names it.

    >>> layer_key("crossattention.self.query.bias"), layer_key("output.dense.weight")
    ('crossattention.query.bias', 'feed_forward.merge.weight')
    """
    for theirs, ours in BERT_NAMES.items():
        key = key.replace(theirs, ours)
    return key
