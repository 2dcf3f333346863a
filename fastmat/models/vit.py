"""The vision transformer of ALBEF and BLIP, with the names of their checkpoints (Dosovitskiy et al., ICLR 2021)."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class VisionTransformer(nn.Module):
    """Normalised [B, 3, S, S] to tokens [B, 1 + (S / patch)^2, W]: the class token, then the patches row by row."""

    def __init__(
        self,
        *,
        image_size: int,
        patch: int = 16,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        hidden: int = 3072,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch, patch)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=EPS)
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for weight in (self.cls_token, self.pos_embed, *(linear.weight for linear in linears)):
            nn.init.trunc_normal_(weight, std=0.02)
        for linear in linears:
            nn.init.zeros_(linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(images), -1, -1), patches), 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        grow, shrink = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.mlp = nn.Sequential(OrderedDict(fc1=grow, act=nn.GELU(), fc2=shrink))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Self-attention over [B, N, W]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def resized_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """[1, 1 + g * g, W] to [1, 1 + grid * grid, W]: the patches' positions are interpolated (bicubic, corners not
    aligned, no antialias, as both models do), the class token's stays.

    >>> resized_positions(torch.zeros(1, 17, 4), 6).shape
    torch.Size([1, 37, 4])
    """
    old = math.isqrt(pos_embed.shape[1] - 1)
    if old == grid:
        return pos_embed
    patches = pos_embed[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches.float(), (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat((pos_embed[:, :1], patches.flatten(2).transpose(1, 2).to(pos_embed)), 1)
