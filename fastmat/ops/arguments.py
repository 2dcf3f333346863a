"""Checks of operator arguments: one sentence that names the argument, before anything is computed.

They read shapes, dtypes and devices, and Python numbers; never the values of a tensor, so nothing waits for a GPU and
nothing breaks a traced graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from fastmat.errors import UserError
from fastmat.types import Norm

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """The first check of every tensor: that it is one."""
    if not isinstance(tensor, Tensor):
        raise UserError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise UserError(f"{name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], like: str) -> None:
    """`like` says in words where `shape` comes from: "of x", "one per image"."""
    if tuple(tensor.shape) != tuple(shape):
        raise UserError(f"{name} must have shape {tuple(shape)} ({like}), got {tuple(tensor.shape)}")


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise UserError(f"{name} is on {tensor.device}, the other tensors on {device}; move it there")


def check_bounds(bounds: tuple[float, float]) -> None:
    pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2 and all(isinstance(end, Real) for end in bounds)
    if not (pair and bounds[0] < bounds[1]):
        raise UserError(f"bounds must be (low, high) with low < high, got {bounds!r}")


def check_number(name: str, value: float) -> None:
    if not isinstance(value, Real):
        raise UserError(f"{name} must be a number, got {value!r}")


def check_radius(eps: float | Tensor, norm: Norm, bounds: tuple[float, float]) -> None:
    """An eps of 8 where 8/255 was meant: in Linf a ball wider than the box, and than 1, is no ball."""
    if norm == "linf" and not isinstance(eps, Tensor) and eps > max(1.0, bounds[1] - bounds[0]):
        raise UserError(f"eps must be in the units of the pixels, got {eps:g} for bounds {bounds}; is it {eps:g}/255?")


def check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name} must be positive and finite, got {value}")


def check_ids(name: str, ids: Tensor, length: int, like: str) -> None:
    """[length] int64."""
    check_dtype(name, ids, (torch.int64,))
    check_shape(name, ids, (length,), like)


def per_image(name: str, value: float | Tensor, x: Tensor, *, positive: bool) -> tuple[Tensor | None, float]:
    """A size in pixel units, a number or [B] fp32, split into what operator schemas hold: (tensor or None, number)."""
    if isinstance(value, Tensor):
        check_dtype(name, value, (torch.float32,))
        check_shape(name, value, x.shape[:1], "one per image")
        check_device(x.device, **{name: value})
        return value, 0.0
    if not isinstance(value, Real):
        raise UserError(f"{name} must be a number or a tensor [B], got {value!r}")
    if not 0 <= value < math.inf or (positive and value == 0):
        raise UserError(f"{name} must be {'positive' if positive else 'at least 0'} and finite, got {value}")
    return None, float(value)


def check_values(name: str, values: Tensor | None, *, positive: bool) -> None:
    """The same for the values of a tensor: only inside an operator, and only on the CPU, where nobody waits."""
    if values is None or values.device.type != "cpu":
        return
    if not bool(((values > 0 if positive else values >= 0) & values.isfinite()).all()):
        raise UserError(f"{name} must be {'positive' if positive else 'at least 0'} and finite for every image")
