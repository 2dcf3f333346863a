"""Many texts matched with one image: exact, and without anything that the outcome does not depend on.

An image's keys and values are given, no token of padding passes through a product of weights, the first layer's
self-attention, which sees no image, is done once per text, and of the last layer only the first token is computed, for
it alone is scored. A published evaluation repeats all four for every pair. In eval mode only: nothing is dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.models.fusion_bert import Attention, FusionEncoder
from fastmat.models.protocol import ImageKeys, PackedTexts


class Layout(NamedTuple):
    """Where the tokens of R packed texts stand, on their device: first [R]; spread [R, L], the packed place of every
    padded one; seen [R, 1, 1, L], where a token stands; packed [S], the padded place of every packed one."""

    first: Tensor
    spread: Tensor
    seen: Tensor
    packed: Tensor

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device) -> Layout:
        """lengths [R] int64 on the CPU, so that nothing waits for the device."""
        first = lengths.cumsum(0) - lengths
        places = torch.arange(int(lengths.max()))
        seen = places < lengths[:, None]
        spread = (first[:, None] + places).clamp_max(int(lengths.sum()) - 1)
        packed = seen.flatten().nonzero().flatten()
        return cls(*(part.to(device, non_blocking=True) for part in (first, spread, seen[:, None, None], packed)))


def keys_of_images(encoder: FusionEncoder, image_tokens: Tensor) -> ImageKeys:
    """[B, N, D] to keys and values of every layer's cross-attention."""
    found = [layer.crossattention.keys_values(image_tokens) for layer in encoder.layers]  # type: ignore[union-attr, operator]
    return ImageKeys(tuple(keys for keys, _ in found), tuple(values for _, values in found))


def pack_texts(encoder: FusionEncoder, x: Tensor, mask: Tensor) -> PackedTexts:
    """Texts x [T, L, D] as they enter the encoder, mask [T, L] bool with the tokens in front, after the first layer's
    self-attention."""
    attention = encoder.layers[0].attention
    x, _ = attention(x, *attention.keys_values(x), mask[:, None, None])  # type: ignore[union-attr, operator]
    return PackedTexts(x[mask], mask.sum(1).cpu())


def first_fused(encoder: FusionEncoder, image: ImageKeys, texts: PackedTexts) -> Tensor:
    """[R, D]: the first fused token of each of R texts with the one image."""
    layout = Layout.of(texts.lengths, texts.tokens.device)
    x, last = texts.tokens, len(encoder.layers) - 1
    for number, layer in enumerate(encoder.layers):
        if number:
            x = self_attention(layer.attention, x, layout, only_first=number == last)  # type: ignore[arg-type]
        elif not last:
            x = x[layout.first]
        x = layer.crossattention(x[None], image.keys[number], image.values[number])[0][0]  # type: ignore[operator]
        x = layer.feed_forward(x)  # type: ignore[operator]
    return x


def self_attention(attention: Attention, x: Tensor, layout: Layout, *, only_first: bool) -> Tensor:
    """Packed tokens [S, D], each text by itself; `only_first`: of the first tokens alone, [R, D]."""
    wanted = x[layout.first] if only_first else x
    query = attention.query(wanted)
    query, keys, values = (
        attention.heads_of(part)
        for part in (
            query[:, None] if only_first else query[layout.spread],
            attention.key(x)[layout.spread],
            attention.value(x)[layout.spread],
        )
    )
    attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=layout.seen).transpose(1, 2).flatten(2)
    attended = attended.flatten(0, 1)
    merged: Tensor = attention.norm(wanted + attention.merge(attended if only_first else attended[layout.packed]))
    return merged
