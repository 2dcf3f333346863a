"""Random draws of an attack, keyed by sample, so that neither the batch size nor the order changes them.

A `Draws` is handed in; tests hand in recorded ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fastmat.ops import normal_noise, uniform_noise


class Draws(Protocol):
    def uniform(self, name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        """[len(index), *shape] fp32 on index's device, uniform in (-1, 1); row i depends on `name` and index[i]."""
        ...

    def normal(self, name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        """The same, standard normal."""
        ...


class SeededDraws:
    """The default: counter-based noise on the device of `index`, the same on every device."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def uniform(self, name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        return uniform_noise(self._key(name), index, shape)

    def normal(self, name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        return normal_noise(self._key(name), index, shape)

    def _key(self, name: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest(), "big")
