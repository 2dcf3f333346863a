"""Batch normalisation folded into the convolution before it, while an attack runs: the same map with less to do.

In eval mode a batch norm is an affine map per channel, and so is what remains of it after a convolution. A step of an
attack runs the image tower forward and backward; folded, it reads and writes every activation once less each way. The
convolutions' outputs are laid out channels last, which CPUs and tensor cores prefer.

Which norm follows which convolution is seen in a forward, never guessed from names: the norm's input is the very tensor
that the convolution returned, unchanged since, and both run once. What else reads that tensor cannot be seen, so the
folded tower must also agree with the plain one on noise, or nothing is folded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastmat.models.protocol import VisionLanguageModel, unguarded
from fastmat.models.sharding import whole

PROBED = 2  # images of noise that the folded tower must map as the plain one does
TOLERANCE = 1e-3  # of the largest embedding coordinate


class Pair(NamedTuple):
    convolution: nn.Conv2d
    norm: nn.BatchNorm2d


_pairs: WeakKeyDictionary[nn.Module, tuple[Pair, ...]] = WeakKeyDictionary()


@contextmanager
def folded(model: VisionLanguageModel) -> Iterator[None]:
    """Inside, norms of `model`, which is in eval mode, are folded where that is safe; as before outside.

    The parameters stay what and where they are: two methods per pair are replaced. A model without such pairs, and
    one whose norms use the statistics of the batch, runs as it is.
    """
    model = unguarded(model)  # a guard may be random, and run the encoder many times
    assert isinstance(model, nn.Module)
    if model not in _pairs and any(map(_foldable, model.modules())):
        with torch.autocast(model.logit_scale.device.type, enabled=False):  # bf16 would not agree with itself
            _pairs[model] = _safe(model, _seen(model))
    with _replaced([pair for pair in _pairs.get(model, ()) if _foldable(pair.norm) and whole(pair.convolution)]):
        yield


@contextmanager
def _replaced(pairs: list[Pair]) -> Iterator[None]:
    before = [(module, vars(module).get("forward")) for pair in pairs for module in pair]
    try:
        for convolution, norm in pairs:
            vars(convolution)["forward"] = _convolve(convolution, norm)
            vars(norm)["forward"] = _remaining(norm)
        yield
    finally:
        for module, forward in before:
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


def _foldable(norm: nn.Module) -> bool:
    plain = type(norm) is nn.BatchNorm2d or type(norm).__name__ == "BatchNormAct2d"  # timm's: a norm and what follows
    return plain and not norm.training and getattr(norm, "running_var", None) is not None and whole(norm)


@torch.no_grad()
def _convolve(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """The convolution with the norm's scale in its weights and the norm's shift in its bias."""
    assert norm.running_var is not None and norm.running_mean is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias
    weight = (convolution.weight * scale.view(-1, 1, 1, 1)).to(memory_format=torch.channels_last)

    def forward(x: Tensor) -> Tensor:
        return convolution._conv_forward(x, weight, bias)

    return forward


def _remaining(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    rest = [module for name in ("drop", "act") if isinstance(module := getattr(norm, name, None), nn.Module)]

    def forward(x: Tensor) -> Tensor:
        for module in rest:
            x = module(x)
        return x

    return forward


@torch.no_grad()
def _seen(model: VisionLanguageModel) -> list[Pair]:
    """Pairs of one forward in which a norm takes exactly what a convolution returned, and each runs once."""
    assert isinstance(model, nn.Module)
    made: dict[int, tuple[nn.Conv2d, Tensor, int]] = {}  # the tensor is kept, or its id could be another's
    taken: list[Pair] = []
    calls: dict[nn.Module, int] = {}

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if type(module) is nn.Conv2d:
            made[id(output)] = (module, output, output._version)

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        convolution, output, version = made.get(id(inputs[0]), (None, None, -1))
        unchanged = output is not None and output._version == version
        if isinstance(module, nn.BatchNorm2d) and convolution is not None and unchanged:
            taken.append(Pair(convolution, module))

    handles = []
    for module in model.modules():
        if _foldable(module):
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        elif type(module) is nn.Conv2d:
            handles.append(module.register_forward_hook(after))
    try:
        model.encode_image(_noise(model))
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair in taken if all(calls[module] == 1 for module in pair)]


@torch.no_grad()
def _safe(model: VisionLanguageModel, pairs: list[Pair]) -> tuple[Pair, ...]:
    noise = _noise(model)
    plain = model.encode_image(noise).embeds
    with _replaced(pairs):
        folded = model.encode_image(noise).embeds
    return tuple(pairs) if bool((plain - folded).abs().max() <= TOLERANCE * plain.abs().max()) else ()


def _noise(model: VisionLanguageModel) -> Tensor:
    """The same on every device, without touching its random state."""
    size = model.image_transform.size
    generator = torch.Generator().manual_seed(0)
    return torch.rand(PROBED, 3, size, size, generator=generator).to(model.logit_scale.device)
