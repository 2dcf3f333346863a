"""What a test-time defence is: a map from images to images, made again for every forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from fastmat.attacks.draws import Draws

Encode = Callable[[Tensor], Tensor]


class Guard(Protocol):
    """random: whether it draws, so that two calls differ and an attacker must average over calls."""

    random: bool

    def __call__(self, images: Tensor, *, encode: Encode, draws: Draws) -> Tensor:
        """[B, 3, H, W] fp32 in [0, 1] to the same, with gradients for an attacker who knows the guard.

        Where the map has no useful derivative, its docstring says what stands in for it. encode: [B, 3, H, W] to the
        guarded model's embeddings [B, E], with gradients. draws: of this call; rows are keyed by 0 to B - 1.
        """
        ...
