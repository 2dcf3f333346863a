"""Random draws of an attack, keyed by sample, so that neither the batch size nor the order changes them.

A `Draws` is handed in; tests hand in recorded ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Draws(Protocol):
    def uniform(self, name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        """[len(index), *shape] fp32 on index's device, uniform in [-1, 1); row i depends on `name` and index[i]."""
        ...

    def normal(self, name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        """The same, standard normal."""
        ...


class SeededDraws:
    """The default: one generator per (seed, name, sample), on the CPU."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def uniform(self, name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        rows = [torch.rand(tuple(shape), generator=g) for g in self._generators(name, index)]
        return torch.stack(rows).mul_(2).sub_(1).to(index.device)

    def normal(self, name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        rows = [torch.randn(tuple(shape), generator=g) for g in self._generators(name, index)]
        return torch.stack(rows).to(index.device)

    def _generators(self, name: str, index: Tensor) -> list[torch.Generator]:
        def seed(i: int) -> int:
            return int.from_bytes(hashlib.blake2b(f"{self.seed}/{name}/{i}".encode(), digest_size=7).digest(), "big")

        return [torch.Generator().manual_seed(seed(i)) for i in index.tolist()]
