"""What every vision-language model offers, whatever it is made of.

Images go in as [B, 3, H, W] fp32 in [0, 1]; normalisation, resizing and tokenising happen inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastmat.types import ImageTransform


class TextTokens(NamedTuple):
    """Token ids [T, L] int64 and mask [T, L] bool (True where a token stands)."""

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> TextTokens:
        return TextTokens(self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))


class ImageState(NamedTuple):
    """tokens [B, N, D] (the sequence; None where a tower has none), embeds [B, E] projected and un-normalised,
    features [B, E] the same with unit rows."""

    tokens: Tensor | None
    embeds: Tensor
    features: Tensor


class TextState(NamedTuple):
    """ids, mask [T, L]; tokens [T, L, D] (None where a tower keeps none); embeds [T, E] projected and un-normalised;
    features [T, E] unit rows."""

    ids: Tensor
    mask: Tensor
    tokens: Tensor | None
    embeds: Tensor
    features: Tensor


class Encoded(NamedTuple):
    """What one forward of the wrapped module returns; `logit_scale` is the multiplier, already exponentiated."""

    image: ImageState | None
    text: TextState | None
    logit_scale: Tensor


class FusionState(NamedTuple):
    """tokens [P, L, D] after cross-attention, itm_logits [P, 2], attention per layer (None unless asked for)."""

    tokens: Tensor
    itm_logits: Tensor
    attention: tuple[Tensor, ...] | None


@runtime_checkable
class VisionLanguageModel(Protocol):
    """A dual encoder. Implementations are `nn.Module`s.

    image_projection / text_projection: the last map from encoder to embedding, replaceable by any module of the same
    shape (a correction can be inserted between encoder and feature).
    """

    image_transform: ImageTransform
    context_length: int
    image_projection: nn.Module
    text_projection: nn.Module

    @property
    def logit_scale(self) -> Tensor:
        """Scalar multiplier of the cosine, already exponentiated."""
        ...

    def tokenize(self, texts: Sequence[str], *, max_length: int | None = None, pad: bool = False) -> TextTokens:
        """Captions to ids on the CPU, truncated to `max_length` (default: the context), padded to the longest, or with
        `pad` to the full length."""
        ...

    def encode_image(self, images: Tensor) -> ImageState:
        """[B, 3, H, W] fp32 in [0, 1] of any resolution."""
        ...

    def encode_text(self, tokens: TextTokens) -> TextState: ...

    def forward(self, images: Tensor | None, tokens: TextTokens | None) -> Encoded:
        """Both towers in one call, so that a wrapper (DDP, DeepSpeed) sees the whole batch."""
        ...

    def __call__(self, images: Tensor | None, tokens: TextTokens | None) -> Encoded: ...


@runtime_checkable
class FusionModel(VisionLanguageModel, Protocol):
    """A model that also matches an image with a text by cross-attention (ALBEF, BLIP)."""

    def fuse(self, image: ImageState, text: TextState) -> FusionState:
        """States of P pairs, row by row; states are reusable across calls."""
        ...
