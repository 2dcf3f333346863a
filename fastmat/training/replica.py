"""The model that inner attacks see where an engine shards the weights.

They are gathered once per step and kept for the whole attack, not in every forward: PGD-N would gather them 2N times,
a hook could release a weight between two uses, and code that reads weights outside a forward (reuse of captions'
beginnings, folded batch norms, the logit scale) needs them whole. For models of 0.2 to 0.4 B parameters the weights
are a fraction of the activations. They lie in a copy of the module that no engine knows, and go when the attack ends.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from fastmat.models.protocol import VisionLanguageModel


class Replica:
    """Take it before the engine changes `model`. It is frozen, in eval mode, and has no weights of its own."""

    def __init__(self, model: nn.Module) -> None:
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._empty()

    @contextmanager
    def holding(self, model: nn.Module) -> Iterator[VisionLanguageModel]:
        """Inside, the copy of `model`, whose weights are whole now; they are not copied."""
        buffers, weights = dict(model.named_buffers()), dict(model.named_parameters())
        for name, buffer in self._model.named_buffers():
            buffer.copy_(buffers[name])
        for name, parameter in self._model.named_parameters():
            parameter.data = weights[name].detach().view(self._shapes[name])
        try:
            yield cast("VisionLanguageModel", self._model)
        finally:
            self._empty()

    def _empty(self) -> None:
        for parameter in self._model.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
