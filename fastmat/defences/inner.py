"""What defences share of the inner maximisation: how the model stands meanwhile, and attacks on texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastmat.attacks.base import frozen
from fastmat.attacks.engine import active, executing
from fastmat.defences.phases import text_attack
from fastmat.models.protocol import TextTokens, VisionLanguageModel
from fastmat.types import Batch


class Captions(NamedTuple):
    """T texts. shift: what is added to their token embeddings [T, L, D], as they are tokenised alone; or None."""

    texts: tuple[str, ...]
    shift: Tensor | None = None


class TextSearch(Protocol):
    """What `WordSubstitution` and `EmbeddingSpace` offer; the plan is opaque here."""

    def plan(self, model: VisionLanguageModel, texts: Sequence[str]) -> Any: ...

    def search(self, model: VisionLanguageModel, plan: Any, guide: Tensor | None) -> tuple[str, ...] | Captions:
        """Adversarial captions. guide: [T, E] unit image features, one row per caption."""
        ...


@contextmanager
def attacking(model: VisionLanguageModel) -> Iterator[None]:
    """Inside, `model` is in eval mode, without parameter gradients, its batch norms folded where that is safe.

    As before outside: weights, buffers, flags and modes. Every defence makes its adversarial views in here.
    """
    with frozen(model), executing(active(), model):
        yield


@torch.no_grad()
def unit_images(model: VisionLanguageModel, images: Tensor) -> Tensor:
    """[B, E] unit features without a graph."""
    return model.encode_image(images).features


@torch.no_grad()
def unit_captions(model: VisionLanguageModel, captions: Captions) -> Tensor:
    """[T, E] unit features without a graph."""
    return model.encode_text(tokens_of(model, captions)).features


def tokens_of(model: VisionLanguageModel, captions: Captions) -> TextTokens:
    """The tokens of `captions`, with their shift, on the model's device."""
    return model.tokenize(captions.texts).to(model.logit_scale.device)._replace(shift=captions.shift)


class TextAttack:
    """`search` with its plan for the captions of one batch, to be guided by any images of it."""

    def __init__(self, search: TextSearch, model: VisionLanguageModel, batch: Batch) -> None:
        self._search = search
        self._model = model
        self._batch = batch
        with text_attack():
            self._plan = search.plan(model, batch.texts)

    def __call__(self, image_features: Tensor) -> Captions:
        """image_features: [B, E] unit rows that the captions shall not match."""
        with text_attack():
            found = self._search.search(self._model, self._plan, image_features[self._batch.txt2img])
        return found if isinstance(found, Captions) else Captions(tuple(found))
