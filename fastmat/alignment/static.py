"""Corrections that are the same for every input: estimated once on calibration pairs, frozen, free once folded."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastmat.alignment.pairs import Pairs
from fastmat.errors import UserError

Method = Literal["mean", "mean_variance", "least_squares"]
EPS = 1e-6  # added to the adversarial deviation of a channel


class Affine(nn.Module):
    """z * scale + shift, both [C], on [..., C]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, *, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    @property
    def width(self) -> int:
        return len(self.scale)

    def forward(self, features: Tensor) -> Tensor:
        return features * self.scale + self.shift


class Subspace(nn.Module):
    """z without its deviation from `centre` [C] within the span of `basis` [C, K], orthonormal columns; on [..., C].

    Not diagonal: the control for corrections by channel, after the text subspaces of COLA and SA-AET.
    """

    basis: Tensor
    centre: Tensor

    def __init__(self, *, basis: Tensor, centre: Tensor) -> None:
        super().__init__()
        self.register_buffer("basis", basis)
        self.register_buffer("centre", centre)

    @property
    def width(self) -> int:
        return len(self.centre)

    def forward(self, features: Tensor) -> Tensor:
        return features - (features - self.centre) @ self.basis @ self.basis.T


def fit_affine(pairs: Pairs, *, method: Method, shrinkage: float = 0.0) -> Affine:
    """The map per channel from adversarial to clean features.

    mean: shift = mean clean - mean adversarial, scale 1. mean_variance: scale = clean deviation over adversarial, and
    the means meet. least_squares: clean features regressed on adversarial ones, channel by channel.
    shrinkage: rho in [0, 1] of the way back to the identity. Raises UserError outside.
    """
    if not 0 <= shrinkage <= 1:
        raise UserError(f"shrinkage must be in [0, 1], got {shrinkage:g}")
    clean, adversarial = (features.double() for features in pairs.flat())
    mean, mean_adversarial = clean.mean(0), adversarial.mean(0)
    if method == "mean":
        scale = torch.ones_like(mean)
    elif method == "mean_variance":
        scale = clean.std(0, correction=0) / (adversarial.std(0, correction=0) + EPS)
    elif method == "least_squares":
        centred = adversarial - mean_adversarial
        within = centred.square().sum(0)
        across = (centred * (clean - mean)).sum(0)
        scale = torch.where(within > 0, across / within.clamp_min(torch.finfo(within.dtype).tiny), 1.0)
    else:
        raise UserError(f"method must be 'mean', 'mean_variance' or 'least_squares', got {method!r}")
    shift = mean - scale * mean_adversarial
    dtype = pairs.clean.dtype
    return Affine(
        scale=((1 - shrinkage) * scale + shrinkage).to(dtype),
        shift=((1 - shrinkage) * shift).to(dtype),
    )


def shift_basis(pairs: Pairs, *, rank: int) -> Tensor:
    """[C, rank]: the orthonormal directions in which the shifts z' - z are longest, mean included."""
    if not 1 <= rank <= pairs.width:
        raise UserError(f"rank must be between 1 and the {pairs.width} channels, got {rank}")
    clean, adversarial = pairs.flat()
    shift = (adversarial - clean).double()
    _, vectors = torch.linalg.eigh(shift.T @ shift)  # ascending
    return vectors[:, -rank:].flip(1).to(pairs.clean.dtype).contiguous()


def fit_subspace(pairs: Pairs, *, rank: int) -> Subspace:
    """Takes out what lies along the `rank` directions of the longest shifts, and leaves the clean mean there."""
    return Subspace(basis=shift_basis(pairs, rank=rank), centre=pairs.flat()[0].mean(0))


@torch.no_grad()
def folded(projection: nn.Linear, correction: Affine | Subspace) -> nn.Linear:
    """One linear layer that is `projection` and then `correction`: as many operations as the projection alone.

    Raises UserError where the widths differ.
    """
    if correction.width != projection.out_features:
        raise UserError(
            f"the correction is for {correction.width} channels, the projection gives {projection.out_features}"
        )
    bias = projection.weight.new_zeros(projection.out_features) if projection.bias is None else projection.bias
    # What a map does to zero is its bias; the rest of it is linear, and acts on the columns of the weight.
    zero = correction(torch.zeros_like(bias))
    made = nn.Linear(projection.in_features, projection.out_features, device=bias.device, dtype=bias.dtype)
    made.weight.copy_((correction(projection.weight.T) - zero).T)
    made.bias.copy_(correction(bias))
    return made
