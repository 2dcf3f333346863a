"""The module that is wrapped and trained: the model's forward, in as much memory as it may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmat.errors import UserError
from fastmat.models.protocol import (
    Encoded,
    FusionState,
    ImageState,
    TextState,
    TextTokens,
    VisionLanguageModel,
    fuses,
)
from fastmat.training.settings import TrainSettings

# What is to be fused, chosen when both sides are encoded: images, P texts, and the image row [P] of each text.
Select = Callable[[Encoded], tuple[ImageState, TextState, Tensor]]


class Outer(nn.Module):
    """`outer(images, tokens) -> Encoded`, as `model(images, tokens)`; one call of the wrapped module per step.

    With `select` the model also fuses the pairs that it chooses: within the call, so that a wrapper sees them.
    precision: "bf16" runs the towers under autocast; the weights stay fp32, and so does what losses read.
    micro_batch: images, of all views, encoded at a time. Exact gradient caching (Gao et al., RepL4NLP 2021): every
        part is encoded without a graph, the loss sees all features, and the backward encodes each part again, with the
        random state of its first time, so dropout drops the same. It costs one more forward. Autograd's own
        checkpoints do this, so gradients are complete, and synchronised, once.
    compile: the forward goes through `torch.compile`; attacks use the model as it is.
    """

    def __init__(self, model: VisionLanguageModel, settings: TrainSettings, *, device: torch.device) -> None:
        super().__init__()
        assert isinstance(model, nn.Module)
        self.model = model
        self.micro_batch = settings.micro_batch
        self.device_type = device.type
        self.bf16 = settings.precision == "bf16"
        self._encode: Callable[[Tensor | None, TextTokens | None], Encoded] = (
            torch.compile(model.forward) if settings.compile else partial(nn.Module.__call__, model)
        )

    def forward(self, images: Tensor | None, tokens: TextTokens | None, select: Select | None = None) -> Encoded:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.bf16):
            parts = self._parts(images, tokens)
            if len(parts) == 1:
                encoded = self._encode(images, tokens)
            else:
                encoded = joined([checkpoint(self._encode, *part, use_reentrant=False) for part in parts])
            encoded = encoded._replace(logit_scale=encoded.logit_scale.reshape(()))  # an engine may hold it as [1]
            return encoded if select is None else encoded._replace(fused=self._fuse(encoded, select, len(parts)))

    def _fuse(self, encoded: Encoded, select: Select, count: int) -> FusionState:
        """The pairs of `select`, in `count` parts."""
        assert fuses(self.model)
        image, text, owner = select(encoded)
        if count == 1:
            return self.model.fuse(image, text, owner)
        parts = [
            checkpoint(self._fused_rows, image, text, owner, rows, use_reentrant=False)
            for rows in torch.arange(len(owner), device=owner.device).tensor_split(count)
        ]
        return FusionState(torch.cat([p.tokens for p in parts]), torch.cat([p.itm_logits for p in parts]), None)

    def _fused_rows(self, image: ImageState, text: TextState, owner: Tensor, rows: Tensor) -> FusionState:
        assert fuses(self.model) and image.tokens is not None
        return self.model.fuse(image._replace(tokens=image.tokens[owner[rows]]), taken(text, rows))

    def _parts(self, images: Tensor | None, tokens: TextTokens | None) -> list[tuple[Tensor | None, TextTokens | None]]:
        """Images and texts in equally many parts, so that every part runs through both towers."""
        rows = [len(side) for side in (images, None if tokens is None else tokens.ids) if side is not None]
        count = 1 if self.micro_batch is None else min(-(-rows[0] // self.micro_batch), *rows)
        if count == 1:
            return [(images, tokens)]
        image_parts: Sequence[Tensor | None] = [None] * count if images is None else images.tensor_split(count)
        text_parts: Sequence[TextTokens | None] = [None] * count
        if tokens is not None:
            columns = [[None] * count if part is None else part.tensor_split(count) for part in tokens]
            text_parts = [TextTokens(*part) for part in zip(*columns, strict=True)]
        return list(zip(image_parts, text_parts, strict=True))


def taken(text: TextState, rows: Tensor) -> TextState:
    """The rows [P] of T texts, as far as fusion reads them: ids, mask and tokens."""
    tokens = None if text.tokens is None else text.tokens[rows]
    return text._replace(ids=text.ids[rows], mask=text.mask[rows], tokens=tokens)


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The parts of a batch, one below the other."""

    def rows(states: Sequence[Sequence[Tensor | None]]) -> Iterator[Tensor | None]:
        for column in zip(*states, strict=True):
            yield None if column[0] is None else torch.cat(column)

    images = [part.image for part in parts if part.image is not None]
    texts = [part.text for part in parts if part.text is not None]
    return Encoded(
        ImageState(*rows(images)) if images else None,  # type: ignore[arg-type]
        TextState(*rows(texts)) if texts else None,  # type: ignore[arg-type]
        parts[0].logit_scale,
    )


@contextmanager
def checkpointed_blocks(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Inside, the repeated blocks of `model` keep their inputs alone and compute the rest again in the backward.

    Only in train mode: an attack, which runs in eval mode, keeps everything and saves the forward.
    Raises UserError where the model has no repeated blocks.
    """
    blocks = repeated_blocks(model) if enabled else []
    if enabled and not blocks:
        raise UserError(
            "activation_checkpointing needs a model of repeated blocks, and this one has none; leave it off"
        )
    for block in blocks:
        block.forward = partial(_checkpointed, block, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of every outermost list of modules of one class that have weights: what a tower is a stack of."""
    if isinstance(model, nn.ModuleList | nn.Sequential):
        members = list(model)
        if members and len({type(m) for m in members}) == 1 and all(list(m.parameters()) for m in members):
            return members
    return [block for child in model.children() for block in repeated_blocks(child)]


def _checkpointed(block: nn.Module, forward: Callable[..., object], *args: object, **kwargs: object) -> object:
    if not block.training or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(partial(forward, *args, **kwargs), use_reentrant=False)
