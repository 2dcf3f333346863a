"""Shapes of the towers: parameters, and forward FLOPs by what their backward costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple


class Flops(NamedTuple):
    """FLOPs of a forward (2 per multiply-add), apart by what a backward adds.

    linear: matrix products with a weight. core: products of two activations, both of which take a gradient. patch: the
    patch convolution, whose input is the image. Norms, activation functions and softmax are left out: they are bound by
    memory, not by arithmetic.
    """

    linear: float
    core: float = 0.0
    patch: float = 0.0

    @property
    def forward(self) -> float:
        return self.linear + self.core + self.patch

    @property
    def input_backward(self) -> float:
        """Weights frozen, gradient of the image: each weight product once more, each core product twice."""
        return self.linear + 2 * self.core + self.patch

    @property
    def full_backward(self) -> float:
        """Gradient of the weights and of all activations, but not of the image."""
        return 2 * self.linear + 2 * self.core + self.patch


@dataclass(frozen=True, kw_only=True)
class Tower:
    """Transformer blocks of one width. tokens: sequence length, class token included.

    side, patch: of an image tower, pixels; vocabulary, positions: of a text tower. extra: parameters outside the
    blocks that follow from neither (norms, class token, biases). pooled: one row of width into `embed` numbers.
    context, context_width: image tokens that every block attends to as well; 0: none.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    tokens: int
    embed: int = 0
    embed_bias: bool = False
    side: int = 0
    patch: int = 0
    vocabulary: int = 0
    positions: int = 0
    extra: int = 0
    context: int = 0
    context_width: int = 0

    @property
    def block_parameters(self) -> int:
        """Self-attention, feed-forward and two norms, all with biases."""
        d, h = self.width, self.hidden
        return 4 * d * d + 4 * d + 2 * d * h + h + d + 4 * d

    @property
    def cross_parameters(self) -> int:
        """Cross-attention of one block and its norm."""
        d, c = self.width, self.context_width
        return 2 * d * d + 2 * c * d + 4 * d + 2 * d if self.context else 0

    @property
    def parameters(self) -> int:
        d = self.width
        outside = 3 * self.patch**2 * d + self.vocabulary * d + self.positions * d + self.extra
        outside += self.embed * d + self.embed * self.embed_bias
        return self.layers * (self.block_parameters + self.cross_parameters) + outside

    @property
    def context_flops(self) -> float:
        """Keys and values of the image tokens, which texts of one image can share."""
        return 4.0 * self.layers * self.context * self.context_width * self.width

    @property
    def flops(self) -> Flops:
        """Of one image or one text."""
        n, d = self.tokens, self.width
        linear: float = self.layers * n * (8 * d * d + 4 * d * self.hidden) + 2 * d * self.embed
        core = self.layers * 4 * n * n * d
        if self.context:
            linear += self.layers * n * 4 * d * d + self.context_flops
            core += self.layers * 4 * n * self.context * d
        patches = (self.side // self.patch) ** 2 if self.patch else 0
        return Flops(linear, core, 2.0 * patches * 3 * self.patch**2 * d)


@dataclass(frozen=True, kw_only=True)
class Model:
    """image, text: towers of the dual encoder. fusion: blocks that score (image, text) pairs, for ITM; None: none.

    shared: fusion runs the text tower's own blocks with cross-attention switched on (BLIP), so that only the
        cross-attention is its own. heads: parameters outside the towers (temperature, matching head).
    queue: entries of each feature queue; 0: neither queues nor momentum encoders. buffers: bytes that DDP sends before
        every forward (CLIP's causal mask).
    """

    name: str
    image: Tower
    text: Tower
    fusion: Tower | None = None
    shared: bool = False
    heads: int = 1
    queue: int = 0
    buffers: int = 0

    @property
    def embed(self) -> int:
        return self.image.embed

    @property
    def fusion_parameters(self) -> int:
        """The fusion blocks' own."""
        if self.fusion is None:
            return 0
        return self.fusion.layers * self.fusion.cross_parameters if self.shared else self.fusion.parameters

    @property
    def parameters(self) -> int:
        """Trained ones, momentum copies apart."""
        return self.image.parameters + self.text.parameters + self.fusion_parameters + self.heads

    @property
    def momentum_parameters(self) -> int:
        """The moving-average copy: both towers; ALBEF copies the fusion blocks along, BLIP's text encoder whole."""
        return self.image.parameters + self.text.parameters + self.fusion_parameters if self.queue else 0


def vit(*, side: int, patch: int, layers: int, width: int, embed: int, extra: int, embed_bias: bool = False) -> Tower:
    tokens = (side // patch) ** 2 + 1
    return Tower(
        layers=layers,
        width=width,
        heads=width // 64,
        hidden=4 * width,
        tokens=tokens,
        embed=embed,
        embed_bias=embed_bias,
        side=side,
        patch=patch,
        positions=tokens,
        extra=extra,
    )


CLIP_B16 = Model(
    name="CLIP ViT-B/16",
    image=vit(side=224, patch=16, layers=12, width=768, embed=512, extra=5 * 768),  # class token, two norms
    # open_clip pads every text to the context of 77
    text=Tower(
        layers=12,
        width=512,
        heads=8,
        hidden=2048,
        tokens=77,
        embed=512,
        vocabulary=49408,
        positions=77,
        extra=2 * 512,
    ),
    buffers=4 * 77 * 77,
)
# timm's ViT: class token, one norm, a bias on the patches
_VIT_384 = vit(side=384, patch=16, layers=12, width=768, embed=256, embed_bias=True, extra=4 * 768)
# ALBEF, arXiv 2107.07651: BERT-base cut in two, six blocks of text, six with cross-attention; texts of 30 tokens
_BERT = Tower(
    layers=6,
    width=768,
    heads=12,
    hidden=3072,
    tokens=30,
    embed=256,
    embed_bias=True,
    vocabulary=30522,
    positions=512,
    extra=2 * 768 + 2 * 768,  # token types, one norm
)
ALBEF = Model(
    name="ALBEF",
    image=_VIT_384,
    text=_BERT,
    fusion=Tower(layers=6, width=768, heads=12, hidden=3072, tokens=30, context=577, context_width=768),
    heads=768 * 2 + 2 + 1,
    queue=65_536,
)
# BLIP, arXiv 2201.12086: all twelve blocks with cross-attention, used with and without; texts of 35 tokens, no types
_BLIP_TEXT = replace(_BERT, layers=12, tokens=35, vocabulary=30524, extra=2 * 768)
BLIP = Model(
    name="BLIP",
    image=_VIT_384,
    text=_BLIP_TEXT,
    fusion=Tower(layers=12, width=768, heads=12, hidden=3072, tokens=35, context=577, context_width=768),
    shared=True,
    heads=768 * 2 + 2 + 1,
    queue=57_600,
)
MODELS = {"clip-vit-b16": CLIP_B16, "albef": ALBEF, "blip": BLIP}
