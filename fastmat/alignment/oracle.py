"""The upper bound: a correction that is told the clean features of what it corrects, which no defence can be."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmat.errors import UserError


class Oracle(nn.Module):
    """z' without the part of its shift z' - z that lies in the span of `basis` [C, K], orthonormal columns.

    basis: None: all of it, so the clean features come back. clean: [B, ..., C] of the batch that passes next, set by
    whoever runs it; None: features pass as they are. Raises UserError for a batch of another size.
    """

    basis: Tensor | None

    def __init__(self, *, width: int, basis: Tensor | None = None) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("basis", basis)
        self.clean: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        if self.clean is None:
            return features
        if self.clean.shape != features.shape:
            told = f"{tuple(features.shape)}, not {tuple(self.clean.shape)}"
            raise UserError(f"an oracle knows the clean features of one batch, whole and in order; it was asked {told}")
        shift = features - self.clean
        return features - (shift if self.basis is None else shift @ self.basis @ self.basis.T)


@torch.no_grad()
def announce(oracle: Oracle, clean: Tensor | None) -> None:
    """What comes next."""
    oracle.clean = clean
