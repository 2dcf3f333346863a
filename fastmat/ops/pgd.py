"""The projected-gradient update: direction, step, projection to the eps ball around x0, clamp to the pixel box.

Three functions share one operator: `pgd_step`, `momentum_step` (MI-FGSM, FARE) and `apgd_step`. All of them leave `x`
inside ball and box whatever the gradient holds: a NaN component has sign 0, an infinite one its sign; where a whole
image is normalised (L2, MI-FGSM's mean) a gradient whose length is not finite or below 1e-30 moves nothing.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from fastmat.errors import UserError
from fastmat.ops.arguments import (
    FLOATS,
    check_bounds,
    check_device,
    check_dtype,
    check_number,
    check_radius,
    check_shape,
    check_values,
    per_image,
)
from fastmat.ops.backend import Backend, uses_triton
from fastmat.ops.pgd_reference import pgd_update_reference
from fastmat.types import Norm

Rule = Literal["mi", "fare"]


def pgd_step(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    eps: float | Tensor,
    step_size: float | Tensor,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """One ascent step from `x` along `grad` (Madry et al., ICLR 2018): clamp(P(x + step_size * direction)).

    x [B, ...] fp32. grad: same shape, fp32, fp16 or bf16. x0: same shape, the centre of the ball, fp32 or uint8 (then
        divided by 255). Direction: sign(grad) (Linf), grad / ||grad||_2 per image (L2).
    eps, step_size: in pixel units; a positive number, or [B] fp32 on the device of x. Values of tensors are checked on
        the CPU only, since a check would wait for a GPU; there a negative entry counts as 0.
    out: where the result goes, [B, ...] fp32; `out=x` steps in place, else it shares no memory with the other tensors.
        None: a new tensor.
    Bytes on a GPU: 16 per element in Linf (x, grad, x0 read, out written), 28 in L2, against 68 and 76 of the usual
    PyTorch lines. A tensor that is not contiguous (channels_last, say) is copied first: 8 more each.
    Raises ValueError naming the argument for wrong shapes, dtypes, devices, eps, step_size, bounds or shared memory.
    """
    return _update(x, grad, x0, eps, step_size, norm, bounds, out, backend)


def momentum_step(
    x: Tensor,
    velocity: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    eps: float | Tensor,
    step_size: float | Tensor,
    decay: float,
    rule: Rule = "mi",
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """`pgd_step` along a velocity [B, ...] fp32 (zeros at first), which is updated in place.

    rule "mi": velocity = decay * velocity + grad / mean|grad|, then the direction of velocity (MI-FGSM, Dong et al.,
        CVPR 2018; the mean over the image differs from its L1 norm by a constant, which no direction sees).
    rule "fare": velocity = unit(decay * velocity + unit(grad)), unit being sign or L2 normalisation (RobustVLM's PGD,
        decay 0.9; Schlarmann et al., ICML 2024).
    Bytes on a GPU per element, Linf: 28 (mi), 24 (fare). Everything else as in `pgd_step`.
    Inside torch.compile let velocity be an input of the compiled program, or fresh as zeros_like makes it: inductor, at
    least of torch 2.11 to 2.15, loses the offset of a cloned slice that a custom operator writes.
    """
    if rule not in ("mi", "fare"):
        raise UserError(f"rule must be 'mi' or 'fare', got {rule!r}")
    check_dtype("velocity", velocity, (torch.float32,))
    check_number("decay", decay)
    if not 0 <= decay < math.inf:
        raise UserError(f"decay must be at least 0 and finite, got {decay}")
    return _update(x, grad, x0, eps, step_size, norm, bounds, out, backend, velocity=velocity, decay=decay, rule=rule)


def apgd_step(
    x: Tensor,
    previous: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    eps: float | Tensor,
    step_size: float | Tensor,
    inertia: float = 0.75,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """APGD's step of two terms (Croce & Hein, ICML 2020, equation 1), with a step size per image.

    z = P(x + step_size * direction); result = P(x + inertia * (z - x) + (1 - inertia) * (x - previous)), P being
    projection and clamp. previous [B, ...] fp32 is the iterate before x and becomes x, in place. The first step of APGD
    has inertia 1. Bytes on a GPU per element: 24 (Linf), 52 (L2). Under torch.compile: as velocity in `momentum_step`.
    Everything else as in `pgd_step`.
    """
    check_dtype("previous", previous, (torch.float32,))
    check_number("inertia", inertia)
    if not 0 <= inertia <= 1:
        raise UserError(f"inertia must lie in [0, 1], got {inertia}")
    return _update(x, grad, x0, eps, step_size, norm, bounds, out, backend, previous=previous, inertia=inertia)


def project(
    x: Tensor,
    x0: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """The point of the eps ball around `x0` nearest to `x`, then clamped to the box: `pgd_step` without a step.

    Any finite x [B, ...] fp32; an eps of 0 gives x0.
    """
    return _update(x, x, x0, eps, 0.0, norm, bounds, out, backend, positive_eps=False)


@torch.no_grad()
def _update(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    eps: float | Tensor,
    step_size: float | Tensor,
    norm: Norm,
    bounds: tuple[float, float],
    out: Tensor | None,
    backend: Backend | None,
    *,
    velocity: Tensor | None = None,
    decay: float = 0.0,
    rule: str = "",
    previous: Tensor | None = None,
    inertia: float = 1.0,
    positive_eps: bool = True,
) -> Tensor:
    """Check, then call the operator."""
    check_dtype("x", x, (torch.float32,))
    check_dtype("grad", grad, FLOATS)
    check_dtype("x0", x0, (torch.float32, torch.uint8))
    if out is not None:
        check_dtype("out", out, (torch.float32,))
    written = {"out": out, "velocity": velocity, "previous": previous}
    for name, tensor in {"grad": grad, "x0": x0, **written}.items():
        if tensor is not None:
            check_shape(name, tensor, x.shape, "of x")
    for name, tensor in written.items():
        if tensor is not None and any(
            side > 1 and not step for side, step in zip(x.shape, tensor.stride(), strict=True)
        ):
            raise UserError(f"{name} is written and must not be expanded; clone() makes it whole")
    check_device(x.device, grad=grad, x0=x0, **written)
    if x.dim() == 0:
        raise UserError("x must have a first dimension of images, got a number")
    if norm not in ("linf", "l2"):
        raise UserError(f"norm must be 'linf' or 'l2', got {norm!r}")
    check_bounds(bounds)
    low, high = map(float, bounds)
    eps_each, eps = per_image("eps", eps, x, positive=positive_eps)
    check_radius(eps, norm, bounds)
    step_each, step_size = per_image("step_size", step_size, x, positive=False)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device) if out is None else out
    pgd_update(
        out, velocity, previous, x, grad, x0, eps_each, step_each, eps, step_size, norm, low, high,
        float(decay), rule, float(inertia), backend or "",
    )  # fmt: skip
    return out


@torch.library.custom_op("fastmat::pgd_update", mutates_args=("out", "velocity", "previous"))
def pgd_update(
    out: Tensor,
    velocity: Tensor | None,
    previous: Tensor | None,
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    eps_each: Tensor | None,
    step_each: Tensor | None,
    eps: float,
    step_size: float,
    norm: str,
    low: float,
    high: float,
    decay: float,
    rule: str,
    inertia: float,
    backend: str,
) -> None:
    """`out` (which may be x), velocity and previous are written; eps_each and step_each stand before eps, step_size."""
    check_values("eps", eps_each, positive=step_each is not None or step_size > 0)  # without a step it may be 0
    check_values("step_size", step_each, positive=False)
    for name, state in {"velocity": velocity, "previous": previous}.items():
        if state is not None and state.numel() and state.data_ptr() == out.data_ptr():
            raise UserError(f"{name} and out (or x, where out is x) are both written and must not share memory")
    settings: dict[str, Any] = {
        "eps": eps if eps_each is None else eps_each.contiguous(),
        "step_size": step_size if step_each is None else step_each.contiguous(),
        "norm": norm,
        "low": low,
        "high": high,
        "decay": decay,
        "rule": rule,
        "inertia": inertia,
    }
    flat = (len(x), x[0].numel() if len(x) else 0)
    written = {"out": out, "velocity": velocity, "previous": previous}
    work: dict[str, Any] = {
        name: tensor.contiguous().view(flat) for name, tensor in written.items() if tensor is not None
    }
    read: dict[str, Any] = {
        name: tensor.contiguous().view(flat) for name, tensor in {"x": x, "grad": grad, "x0": x0}.items()
    }
    if uses_triton(backend, x.device):
        from fastmat.kernels.pgd import launch_pgd_update

        launch_pgd_update(**work, **read, **settings)
    else:
        pgd_update_reference(**work, **read, **settings)
    for name, tensor in written.items():
        if tensor is not None and not tensor.is_contiguous():
            tensor.copy_(work[name].view(tensor.shape))


@pgd_update.register_fake
def _(*_: object) -> None:
    return None
