"""Which parameters train, how they decay, and in which mode the modules stand meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastmat.attacks.base import frozen, restored
from fastmat.errors import UserError, nearest
from fastmat.models.protocol import VisionLanguageModel, fuses

TOWERS = ("image", "text")
PARTS = (*TOWERS, "fusion")
LARGEST_LOG_SCALE = math.log(100)


def trained_parameters(model: VisionLanguageModel, trains: tuple[str, ...]) -> list[nn.Parameter]:
    """The parameters that the embeddings of the towers in `trains` depend on; the logit scale when both train; with
    "fusion" those that matching adds to the towers.

    Found by asking autograd, so it holds for any model, and what no output depends on never trains (a wrapper that
    waits for its gradient would hang). A parameter frozen beforehand stays frozen.
    Raises UserError for an unknown tower or when nothing is left to train.
    """
    assert isinstance(model, nn.Module)
    for tower in trains:
        if tower not in PARTS:
            raise UserError(
                f"a defence trains 'image', 'text' or both, or 'fusion', not {tower!r}{nearest(tower, PARTS)}"
            )
    candidates = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with frozen(model), torch.enable_grad():
        for parameter in candidates:
            parameter.requires_grad_(True)
        outputs = _outputs(model, trains)
        reached: Sequence[Tensor | None] = [None] * len(candidates)
        if candidates and outputs.requires_grad:
            reached = torch.autograd.grad(outputs, candidates, allow_unused=True)
    trained = [parameter for parameter, gradient in zip(candidates, reached, strict=True) if gradient is not None]
    if not trained:
        raise UserError(f"nothing to train: no trainable parameter reaches {' or '.join(trains) or 'a tower'}")
    return trained


def _outputs(model: VisionLanguageModel, trains: tuple[str, ...]) -> Tensor:
    device = model.logit_scale.device
    total = torch.zeros((), device=device)
    if "image" in trains:
        size = model.image_transform.size
        total = total + model.encode_image(torch.zeros(1, 3, size, size, device=device)).embeds.sum()
    if "text" in trains:
        total = total + model.encode_text(model.tokenize(["a"]).to(device)).embeds.sum()
    if "fusion" in trains:
        assert fuses(model)
        size = model.image_transform.size
        with torch.no_grad():
            image = model.encode_image(torch.zeros(1, 3, size, size, device=device))
            text = model.encode_text(model.tokenize(["a"]).to(device))
        total = total + model.fuse(image, text).itm_logits.sum()
    if set(trains) >= set(TOWERS):
        total = total + model.logit_scale
    return total


def decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """AdamW's parameter groups: matrices decay; biases, norms and the logit scale do not."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


@contextmanager
def training_mode(
    model: nn.Module, trained: list[nn.Parameter], norm_statistics: Literal["fixed", "batch"]
) -> Iterator[None]:
    """Train mode with gradients for `trained` only; batch-norm in eval mode when "fixed" or untrained.

    Modes and flags are as before outside.
    """
    with restored(model):
        model.train().requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(norm_statistics == "batch" and any(p.requires_grad for p in module.parameters()))
        yield


class BoundedScale(NamedTuple):
    """The parameter that the logit scale is made of, and between what it must stay."""

    parameter: nn.Parameter
    low: float
    high: float


def bounded_scale(model: nn.Module, trained: Iterable[nn.Parameter]) -> BoundedScale | None:
    """CLIP's logarithm of at most log 100, or the temperature of a model that has `temp_bounds`, where it trains."""
    found = None
    if getattr(model, "log_logit_scale", None) is not None:
        found = BoundedScale(model.log_logit_scale, -math.inf, LARGEST_LOG_SCALE)  # type: ignore[arg-type]
    elif getattr(model, "temp_bounds", None) is not None:
        found = BoundedScale(model.temp, *model.temp_bounds)  # type: ignore[arg-type, misc]
    return found if found is not None and any(parameter is found.parameter for parameter in trained) else None


@torch.no_grad()
def clamp_logit_scale(model: nn.Module) -> None:
    """Keep the logit scale in its bounds, as published; those of CLIP are 0 and 100."""
    scale = bounded_scale(model, [parameter for parameter in model.parameters() if parameter.requires_grad])
    if scale is not None:
        scale.parameter.clamp_(scale.low, scale.high)


class NormStatistics:
    """The running statistics of the batch norms that train, so that a step can be taken back."""

    def __init__(self, model: nn.Module) -> None:
        self._norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        self._kept: list[tuple[Tensor, Tensor]] = []

    def keep(self) -> None:
        """Remember them as they are now."""
        self._kept = [(buffer, buffer.clone()) for norm in self._norms for buffer in norm.buffers()]

    def restore(self) -> None:
        """Put back what was kept."""
        for buffer, value in self._kept:
            buffer.copy_(value)
