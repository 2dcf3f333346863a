"""What every vision-language model offers, whatever it is made of.

Images go in as [B, 3, H, W] fp32 in [0, 1]; normalisation, resizing and tokenising happen inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from fastmat.types import ImageTransform


class TextTokens(NamedTuple):
    """Token ids [T, L] int64 and mask [T, L] bool (True where a token stands).

    shift: [T, L, D], added to the embeddings of the tokens by an `EmbeddingModel`; None: nothing.
    """

    ids: Tensor
    mask: Tensor
    shift: Tensor | None = None

    def to(self, device: torch.device | str) -> TextTokens:
        shift = None if self.shift is None else self.shift.to(device, non_blocking=True)
        return TextTokens(self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True), shift)


def token_batch(rows: Sequence[Sequence[int]], *, pad_id: int, length: int | None = None) -> TextTokens:
    """Rows of ids, padded to `length` (default: the longest)."""
    full = max(map(len, rows), default=0) if length is None else length
    padded = [[*row, *[pad_id] * (full - len(row))] for row in rows]
    ids = torch.tensor(padded, dtype=torch.int64).view(len(rows), full)
    return TextTokens(ids, torch.arange(full) < torch.tensor([len(row) for row in rows])[:, None])


def encodable(text: str) -> str:
    """The text with half characters (lone surrogates, as broken JSON has them) as question marks.

    >>> encodable("dog \\ud83d"), encodable("dog \\U0001f415")
    ('dog ?', 'dog \\U0001f415')
    """
    return text.encode("utf-8", "replace").decode("utf-8")


class Tokenizer(Protocol):
    """pad_id fills rows up to the longest; pad_to_context: the text tower needs rows of full length.

    For every text, `tokenizer(text, n)` is `frame(ids, n)` of the ids of its words, if `word` knows them all.
    """

    pad_id: int
    pad_to_context: bool

    def __call__(self, text: str, max_length: int) -> list[int]:
        """Ids of one caption with its special tokens, at most `max_length` of them."""
        ...

    def word(self, word: str) -> tuple[int, ...] | None:
        """Ids of what stands between two blanks; None where they may depend on the words around it."""
        ...

    def frame(self, ids: Sequence[int], max_length: int) -> list[int]:
        """Special tokens around the ids of words, which are cut so that there are at most `max_length` in all."""
        ...


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


class TextPrefixes(NamedTuple):
    """T texts, and what any text that begins like one of them needs: keys and values per layer [T, H, L, D]."""

    state: TextState
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Encoded(NamedTuple):
    """What one forward of the wrapped module returns; `logit_scale` is the multiplier, already exponentiated.

    fused: the pairs that a training step asked for.
    """

    image: ImageState | None
    text: TextState | None
    logit_scale: Tensor
    fused: FusionState | None = None


class FusionState(NamedTuple):
    """tokens [P, L, D] after cross-attention; itm_logits [P, 2], no match and match; attention to the image tokens
    [P, H, L, N] per layer that looks at them (None unless asked for)."""

    tokens: Tensor
    itm_logits: Tensor
    attention: tuple[Tensor, ...] | None


class ImageKeys(NamedTuple):
    """What texts look at in B images: keys and values [B, H, N, D / H] per layer."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class PackedTexts(NamedTuple):
    """T texts ready to be matched, as far as no image is needed: tokens [S, D] of one after the other, without padding;
    lengths [T] int64, on the CPU."""

    tokens: Tensor
    lengths: Tensor

    def take(self, rows: Tensor) -> PackedTexts:
        """The texts `rows` [R] int64, on the CPU, in that order."""
        lengths = self.lengths[rows]
        shift = (self.lengths.cumsum(0) - self.lengths)[rows] - (lengths.cumsum(0) - lengths)
        places = torch.repeat_interleave(shift, lengths) + torch.arange(int(lengths.sum()))
        return PackedTexts(self.tokens[places.to(self.tokens.device, non_blocking=True)], lengths)

    @classmethod
    def join(cls, parts: Sequence[PackedTexts]) -> PackedTexts:
        """All texts of several packs."""
        return cls(torch.cat([part.tokens for part in parts]), torch.cat([part.lengths for part in parts]))


@runtime_checkable
class VisionLanguageModel(Protocol):
    """A dual encoder. Implementations are `nn.Module`s.

    image_projection / text_projection: the last map from encoder to embedding, replaceable by any module of the same
    shape (a correction can be inserted between encoder and feature).
    """

    image_transform: ImageTransform
    context_length: int
    tokenizer: Tokenizer
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
class PrefixModel(VisionLanguageModel, Protocol):
    """A model that can encode the beginning which texts share once, because its text tower may be causal."""

    def text_prefixes(self, tokens: TextTokens) -> TextPrefixes | None:
        """Encode [T, L] and keep what continuations need; None when the tower cannot be continued."""
        ...

    def continue_text(self, prefixes: TextPrefixes, owner: Tensor, start: Tensor, ids: Tensor) -> TextState:
        """Text r begins with the first `start[r]` ids of prefix `owner[r]` and goes on with `ids[r]` to its end.

        owner, start [R] int64; ids [R, S] int64, all of the same length; the state has no tokens.
        """
        ...


@runtime_checkable
class EmbeddingModel(VisionLanguageModel, Protocol):
    """A model whose text tower begins with a table of token embeddings, to which `TextTokens.shift` is added."""

    @property
    def token_embedding(self) -> nn.Embedding | None:
        """The table; None when the tower hides it."""
        ...


@runtime_checkable
class FusionModel(VisionLanguageModel, Protocol):
    """A model that also matches an image with a text by cross-attention (ALBEF, BLIP).

    The first token of an image or text state, and of the fused one, is its class token.
    mean, std: [3, 1, 1], what `encode_image` normalises with. ranks_with_cosine: whether re-ranking, as published, adds
    the cosine to the matching logit (BLIP) or takes the logit alone (ALBEF). rereads_text: whether a text's ids are
    embedded anew to match it (BLIP), so that `TextTokens.shift` does not reach the match.
    """

    mean: Tensor
    std: Tensor
    ranks_with_cosine: bool
    rereads_text: bool

    def fuse(self, image: ImageState, text: TextState, owner: Tensor | None = None, maps: bool = False) -> FusionState:
        """States of P pairs; states are reusable across calls.

        owner: [P] int64, the image row of each text; None: row by row. What is computed of an image alone is computed
        once, however many texts it has. maps: also give the attention to the image, in the graph.
        """
        ...

    def image_keys(self, image_tokens: Tensor) -> ImageKeys:
        """What `match` needs of images, [B, N, D] of an `ImageState`."""
        ...

    def pack_texts(self, text: TextState) -> PackedTexts:
        """What `match` needs of texts; in eval mode."""
        ...

    def match(self, image: ImageKeys, texts: PackedTexts) -> Tensor:
        """ITM logits [R, 2] of one image with R texts, those of `fuse` up to rounding; in eval mode."""
        ...


@runtime_checkable
class EntailmentModel(FusionModel, Protocol):
    """A fusion model that was fine-tuned for visual entailment.

    entailment_head: the first fused token [P, D] to logits [P, 3] of contradiction, neutral, entailment.
    """

    entailment_head: nn.Module


@runtime_checkable
class CaptioningModel(VisionLanguageModel, Protocol):
    """A model that writes captions. `tokenize` gives them as its decoder reads them, behind its prompt; a text alone it
    does not encode: `encode_text` raises UserError."""

    def generate(self, images: Tensor) -> list[str]:
        """A caption for each of [B, 3, H, W], without gradients."""
        ...

    def caption_losses(self, image: ImageState, tokens: TextTokens, owner: Tensor) -> Tensor:
        """[T]: cross-entropy per token of captions [T, L] given image row owner [T], the prompt not counted."""
        ...


# Not isinstance: from Python 3.12 on it sees no attribute that a module keeps among its submodules.
def has_prefixes(model: VisionLanguageModel) -> TypeGuard[PrefixModel]:
    return hasattr(model, "text_prefixes")


def has_embeddings(model: VisionLanguageModel) -> TypeGuard[EmbeddingModel]:
    return hasattr(model, "token_embedding")


def fuses(model: VisionLanguageModel) -> TypeGuard[FusionModel]:
    return hasattr(model, "fuse")


def entails(model: VisionLanguageModel) -> TypeGuard[EntailmentModel]:
    return hasattr(model, "entailment_head")


def unguarded(model: VisionLanguageModel) -> VisionLanguageModel:
    """The model behind a test-time guard (`fastmat.guards`), or the model itself."""
    return getattr(model, "unguarded", model)


def captions_images(model: VisionLanguageModel) -> TypeGuard[CaptioningModel]:
    return hasattr(model, "caption_losses")
