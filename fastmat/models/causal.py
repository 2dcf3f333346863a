"""A causal text tower block by block, so that the beginning which texts share is encoded once.

A token sees only what stands before it. The states of a shared beginning are therefore the same in every text that has
it, and a text that differs from another at position p needs new states from p on. Only the last state is pooled, so
the last block computes keys and values for all positions but a state for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class CausalBlock:
    """x + merge(attention(project(norm_1(x)))), then x + feed_forward(norm_2(x)).

    project: [..., W] to queries, keys and values, each [..., W].
    """

    heads: int
    norm_1: Map
    project: Callable[[Tensor], Sequence[Tensor]]
    merge: Map
    norm_2: Map
    feed_forward: Map


@dataclass(frozen=True, kw_only=True)
class CausalTower:
    """embed: ids and positions, both [N, S], to [N, S, W]. norm: after the last block."""

    embed: Callable[[Tensor, Tensor], Tensor]
    blocks: Sequence[CausalBlock]
    norm: Map

    def prefixes(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Pooled states [T, W] at the end of each text, and keys and values [T, H, L, D] of every block.

        ids [T, L], padded at the end; lengths [T].
        """
        count, longest = ids.shape
        positions = torch.arange(longest, device=ids.device).expand(count, longest)
        x = self.embed(ids, positions)
        keys, values = [], []
        last = (torch.arange(count, device=ids.device), lengths - 1)
        for n, block in enumerate(self.blocks):
            q, k, v = (split_heads(part, block.heads) for part in block.project(block.norm_1(x)))
            keys.append(k)
            values.append(v)
            if n + 1 < len(self.blocks):
                x = finish(block, x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
            else:  # padding stands behind the end, which must not see it
                q, x = q[last[0], :, last[1]][:, :, None], x[last][:, None]
                seen = (positions < lengths[:, None])[:, None, None]
                x = finish(block, x, F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
        return self.norm(x)[:, 0], tuple(keys), tuple(values)

    def continued(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], owner: Tensor, start: Tensor, ids: Tensor
    ) -> Tensor:
        """Pooled states [R, W] of texts that begin as text `owner[r]` up to `start[r]` and go on with ids [R, S]."""
        count, length = ids.shape
        place = torch.arange(length, device=ids.device)
        longest = min(keys[0].shape[2], int(start.max()))
        before = torch.arange(longest, device=ids.device) < start[:, None]
        seen = torch.cat(
            (before[:, None].expand(count, length, longest), (place[:, None] >= place).expand(count, length, length)), 2
        )[:, None]
        x = self.embed(ids, start[:, None] + place)
        for n, block in enumerate(self.blocks):
            q, k, v = (split_heads(part, block.heads) for part in block.project(block.norm_1(x)))
            k = torch.cat((keys[n][:, :, :longest][owner], k), 2)
            v = torch.cat((values[n][:, :, :longest][owner], v), 2)
            if n + 1 == len(self.blocks):
                q, x, seen = q[:, :, -1:], x[:, -1:], seen[:, :, -1:]
            x = finish(block, x, F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
        return self.norm(x)[:, 0]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[N, S, W] to [N, H, S, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def finish(block: CausalBlock, x: Tensor, attended: Tensor) -> Tensor:
    """What follows the attention [N, H, S, D] of a block."""
    x = x + block.merge(attended.transpose(1, 2).flatten(2))
    return x + block.feed_forward(block.norm_2(x))
