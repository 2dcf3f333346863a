"""Features of every layer of both encoders, found by the protocol and by one rule, whatever the model is made of.

The protocol names the projections and the image tokens that enter fusion. Inner layers are found by shape: a tower is a
stack of blocks, so in every outermost list of modules (`nn.Sequential`, `nn.ModuleList`) whose classes repeat, the
last module of each repetition gives a layer: each block of a transformer, each stage of a MobileNet, each activation of
conv-norm-activation stacks. Which encoder a layer belongs to is seen in a forward.

A layer's feature is [N, C]: the mean over tokens (of a caption: those that are words) or over places of [N, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastmat.attacks.base import frozen
from fastmat.models.protocol import VisionLanguageModel, fuses

Part = TypeVar("Part", Tensor, Sequence[str])


def stacked(model: nn.Module) -> list[nn.Module]:
    """The last module of every repetition, in every outermost list of `model` whose classes repeat.

    >>> [type(m).__name__ for m in stacked(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU()))]
    ['ReLU', 'ReLU']
    """
    if isinstance(model, nn.ModuleList | nn.Sequential):
        members = list(model)
        period = repetition([type(member) for member in members])
        parts = [members[start : start + period] for start in range(0, len(members), period)] if period else []
        if parts and all(any(True for module in part for _ in module.parameters()) for part in parts):
            return [part[-1] for part in parts]
    return [layer for child in model.children() for layer in stacked(child)]


def repetition(kinds: Sequence[object]) -> int:
    """The least number of entries after which `kinds` begins anew, at least twice in all; 0: it never does.

    >>> repetition("abab"), repetition("aaa"), repetition("abc"), repetition("a")
    (2, 1, 0, 0)
    """
    n = len(kinds)
    return next((p for p in range(1, n // 2 + 1) if n % p == 0 and all(kinds[i] == kinds[i % p] for i in range(n))), 0)


def image_layers(model: VisionLanguageModel, images: Iterable[Tensor]) -> dict[str, Tensor]:
    """Layer to [N, C] float32 on the CPU, in the order of the forward. images: parts [B, 3, H, W] of N."""

    def encode(part: Tensor, found: dict[str, Tensor]) -> None:
        state = model.encode_image(part.to(model.logit_scale.device))
        if fuses(model) and state.tokens is not None:
            found["tokens to fusion"] = state.tokens

    return _collected(model, model.image_projection, images, encode, two=lambda part: part[:1].repeat(2, 1, 1, 1))


def text_layers(model: VisionLanguageModel, texts: Iterable[Sequence[str]]) -> dict[str, Tensor]:
    """The same for captions; texts: parts of T."""

    def encode(part: Sequence[str], found: dict[str, Tensor]) -> None:
        model.encode_text(model.tokenize(part).to(model.logit_scale.device))

    return _collected(
        model,
        model.text_projection,
        texts,
        encode,
        two=lambda part: [part[0]] * 2,
        mask=lambda part: model.tokenize(part).mask,
    )


@torch.no_grad()
def _collected(
    model: VisionLanguageModel,
    projection: nn.Module,
    parts: Iterable[Part],
    encode: Callable[[Part, dict[str, Tensor]], None],
    *,
    two: Callable[[Part], Part],
    mask: Callable[[Part], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Every layer that `encode` passes, over all parts. two: a part of two rows; mask: which tokens of a part count."""
    assert isinstance(model, nn.Module)
    rows: dict[str, list[Tensor]] = {}
    turned: set[str] | None = None
    with frozen(model):
        for part in parts:
            if turned is None:
                with recorded(model, projection) as found:
                    encode(two(part), found)
                # Layers that put the sequence first: with two rows it shows.
                turned = {name for name, z in found.items() if z.dim() == 3 and len(z) != 2 and z.shape[1] == 2}
            with recorded(model, projection) as found:
                encode(part, found)
            kept = None if mask is None else mask(part)
            for name, z in found.items():
                z = z.transpose(0, 1) if name in turned else z
                rows.setdefault(name, []).append(pooled(z.float().cpu(), kept))
    return {name: torch.cat(values) for name, values in rows.items()}


@contextmanager
def recorded(model: nn.Module, projection: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward leaves its layers in the mapping: "block 1" ..., "projection input", "projection output"."""
    found: dict[str, Tensor] = {}

    def block(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        if isinstance(first, Tensor) and first.dim() in (2, 3, 4):
            found[f"block {1 + sum(name.startswith('block') for name in found)}"] = first

    def last(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found["projection input"], found["projection output"] = inputs[0], output

    handles = [layer.register_forward_hook(block) for layer in stacked(model)]
    handles.append(projection.register_forward_hook(last))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def pooled(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """[N, C] of [N, C], [N, L, C] or [N, C, H, W]. mask [N, L]: which tokens count, where there are L of them."""
    if features.dim() == 4:
        return features.mean((2, 3))
    if features.dim() == 2:
        return features
    if mask is None or mask.shape != features.shape[:2]:
        return features.mean(1)
    kept = mask[..., None].to(features)
    return (features * kept).sum(1) / kept.sum(1).clamp_min(1)
