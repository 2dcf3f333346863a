"""ALBEF's fusion and matching head on top of a CLIP: a fusion model for where no weights of ALBEF or BLIP can be had.

What CLIP learned is kept, towers and projections; only what looks at both modalities begins with random weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmat.errors import UserError
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.fusion_checkpoint import FusionSizes
from fastmat.models.matcher import Matcher, fusion_of
from fastmat.models.open_clip import load_open_clip
from fastmat.models.protocol import TextState, TextTokens
from fastmat.models.shifting import shifted
from fastmat.models.small_fusion import scale_to_width


class PooledFirst(nn.Module):
    """An image tower's tokens as [B, 1 + N, D]: what it pools, as the projection reads it, then all others normalised,
    for those of a convolution have any size."""

    def __init__(self, tower: nn.Module, *, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        pooled, tokens = self.tower(images)
        return torch.cat((pooled[:, None], self.norm(tokens)), 1)


class FusedClip(Matcher):
    """Implements `fastmat.models.protocol.FusionModel` with the pieces of `clip`, which is used up."""

    ranks_with_cosine = False
    rereads_text = False

    def __init__(self, *, clip: DualEncoder, sizes: FusionSizes) -> None:
        super().__init__(
            sizes=sizes,
            tokenizer=clip.tokenizer,
            context_length=clip.context_length,
            image_tower=PooledFirst(clip.image_tower, width=sizes.image_width),
        )
        self.text_tower = clip.text_tower
        self.image_projection, self.text_projection = clip.image_projection, clip.text_projection
        self.temp = nn.Parameter(1 / clip.logit_scale.detach())
        self.image_transform, self.mean, self.std = clip.image_transform, clip.mean, clip.std
        self.text_norm = nn.LayerNorm(sizes.text_width)
        self.fusion = fusion_of(sizes, dropout=0.0)
        scale_to_width(self.fusion, self.itm_head)

    @property
    def token_embedding(self) -> nn.Embedding | None:
        return getattr(self.text_tower, "token_embedding", None)

    def tokenize(self, texts: Sequence[str], *, max_length: int | None = None, pad: bool = False) -> TextTokens:
        return super().tokenize(texts, max_length=max_length, pad=pad or self.tokenizer.pad_to_context)

    def encode_tokens(self, tokens: TextTokens) -> Tensor:
        with shifted(self.token_embedding, tokens.shift):
            pooled, hidden = self.text_tower(tokens.ids, tokens.mask)
        return torch.cat((pooled[:, None], hidden[:, 1:]), 1)

    def fusion_input(self, text: TextState) -> Tensor:
        assert text.tokens is not None
        normalised: Tensor = self.text_norm(text.tokens)
        return normalised


def fused_clip(
    architecture: str,
    *,
    pretrained: str | None = None,
    image_size: int | None = None,
    fusion_layers: int = 2,
    fusion_heads: int = 4,
    seed: int = 0,
) -> FusedClip:
    """A model of the open_clip library with a fusion of random weights on top.

    architecture, pretrained, image_size: as `load_open_clip` takes them.
    fusion_layers, fusion_heads: of the fusion, as wide as the text tower. seed: of its weights; the global random state
        is left alone.
    Raises UserError as `load_open_clip`, and for a model whose towers give no tokens or whose width the heads do not
    divide.
    """
    clip = load_open_clip(architecture, pretrained=pretrained, image_size=image_size)
    size = clip.image_transform.size
    with torch.no_grad():
        clip.eval()
        image = clip.encode_image(torch.zeros(1, 3, size, size))
        text = clip.encode_text(clip.tokenize([""]))
    if image.tokens is None or text.tokens is None:
        raise UserError(
            f"{architecture} gives no tokens of {'images' if image.tokens is None else 'texts'} to fuse; take a model "
            "with a vision transformer or a timm trunk, and open_clip's own text tower"
        )
    width = text.tokens.shape[-1]
    sizes = FusionSizes(
        image_size=size,
        patch=1,
        image_width=image.tokens.shape[-1],
        image_heads=1,
        vocabulary=0,
        positions=clip.context_length,
        text_width=width,
        text_layers=0,
        fusion_layers=fusion_layers,
        text_heads=fusion_heads,
        text_hidden=4 * width,
        embed_dim=text.embeds.shape[-1],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FusedClip(clip=clip, sizes=sizes)
