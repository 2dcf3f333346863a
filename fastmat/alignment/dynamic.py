"""Corrections that depend on the input: a gate and a shift per channel, squeeze-excite form, that begin as identity.

Zero-initialised, and with biases in the last layers: at zero weights they are a static affine map, so what a trained
gate gains over its own constant-input control (`with_inputs` of one row) is what the input gives it, and no more.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmat.errors import UserError

LEAST_HIDDEN = 4  # units of the squeeze in narrow models


class Gate(nn.Module):
    """z * (1 + gamma * tanh(W2 h)) + unit * W3 h with h = ReLU(W1 g), on [B, C] or [B, L, C].

    g: the layer norm of the features, of tokens of their mean. reduction: C over the units of h (squeeze-excite: 16).
    gamma: how far a factor may leave 1. unit: the size of a feature, so that one learning rate fits every model.
    inputs: [M, C], what g is made of in place of the features: sample i of a batch gets row i mod M. One row: a
        constant input, so a static map with the parameters of a gate; rows of other images: shuffled inputs.
    Raises UserError without a positive reduction and gamma.
    """

    unit: Tensor
    inputs: Tensor | None

    def __init__(
        self,
        *,
        width: int,
        reduction: int = 16,
        gamma: float = 1.0,
        unit: float = 1.0,
        inputs: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if reduction < 1 or not gamma > 0:
            raise UserError(f"reduction must be at least 1 and gamma above 0, got {reduction} and {gamma:g}")
        hidden = max(width // reduction, LEAST_HIDDEN)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.squeeze = nn.Linear(width, hidden)
            self.factor = nn.Linear(hidden, width)
            self.offset = nn.Linear(hidden, width)
        for last in (self.factor, self.offset):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.reduction = reduction
        self.gamma = gamma
        self.register_buffer("unit", torch.tensor(float(unit)))
        self.register_buffer("inputs", inputs)

    @property
    def width(self) -> int:
        return self.squeeze.in_features

    def forward(self, features: Tensor) -> Tensor:
        summary = self.summary(features)
        hidden = F.relu(self.squeeze(F.layer_norm(summary, (self.width,))))
        factor, offset = 1 + self.gamma * torch.tanh(self.factor(hidden)), self.unit * self.offset(hidden)
        if features.dim() == 3:
            factor, offset = factor[:, None], offset[:, None]
        return features * factor + offset

    def summary(self, features: Tensor) -> Tensor:
        """[B, C] that the gate looks at."""
        if self.inputs is None:
            return features if features.dim() == 2 else features.mean(1)
        return self.inputs[torch.arange(len(features), device=features.device) % len(self.inputs)]


def summaries(features: Tensor) -> Tensor:
    """[N, C] of [N, C] or [N, L, C]: what a gate would look at."""
    return features if features.dim() == 2 else features.mean(1)


def size_of(features: Tensor) -> float:
    """The root mean square of a feature's values.

    >>> size_of(torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
    3.5355
    """
    return round(float(features.square().mean().sqrt()), 4)


def with_inputs(gate: Gate, inputs: Tensor) -> Gate:
    """A copy whose gate looks at `inputs` [M, C] in place of the features."""
    changed = copy.deepcopy(gate)
    changed.inputs = inputs.clone()
    return changed


@torch.no_grad()
def randomised(gate: Gate, features: Tensor, *, seed: int) -> Gate:
    """A copy with random last layers that moves `features` as far, in the root mean square, as `gate` does.

    A control: if it helps as well, what helps is that something moves. Where `gate` moves nothing, neither does it.
    """
    wanted = moved(gate, features)
    made = copy.deepcopy(gate)
    generator = torch.Generator().manual_seed(seed)
    directions = []
    for last in (made.factor, made.offset):
        directions.append(torch.randn(last.weight.shape, generator=generator).to(last.weight) / len(last.weight) ** 0.5)
        last.bias.zero_()
    low, high = 0.0, 1e3
    for _ in range(50):  # the distance grows with the size of the weights
        middle = (low + high) / 2
        for last, direction in zip((made.factor, made.offset), directions, strict=True):
            last.weight.copy_(middle * direction)
        low, high = (middle, high) if moved(made, features) < wanted else (low, middle)
    return made


@torch.no_grad()
def moved(correction: nn.Module, features: Tensor) -> float:
    """The root mean square of what a correction adds to `features`."""
    return float((correction(features) - features).square().mean().sqrt())
