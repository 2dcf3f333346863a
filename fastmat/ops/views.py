"""Scale views: noise, bicubic resize to another scale, clamp, bicubic resize back.

    view_s = up_s(clamp(down_s(x + noise_s)))

the augmentation of SGA (Lu et al., ICCV 2023, section 3.3) and of its successors. A bicubic resize is separable: along
each axis it is a product with a constant banded matrix. So is its transpose, which makes the backward the same work as
the forward, without atomics. The matrices are torch's own, the resize of an identity, so that views and torchvision's
differ by rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.errors import UserError
from fastmat.ops.arguments import check_bounds, check_device, check_dtype, check_positive, check_shape
from fastmat.ops.backend import Backend, uses_triton

# Output rows per small product: enough to amortise a call, few enough that a band is mostly taps and not zeros.
BAND = 32
# Pixels that the reference resizes at a time: three planes of 384 x 384, hundreds of 32 x 32, whose calls would cost
# more than their products; what lies between two products still stays in the cache.
PIXELS = 1 << 19


class Axis(NamedTuple):
    """A resize of one axis, or its transpose; the key under which its tables are kept."""

    source: int
    target: int
    antialias: bool
    dtype: torch.dtype
    device: torch.device
    transposed: bool = False

    def matrix(self) -> Tensor:
        """[n_out, n_in] on the CPU; [target, source], or transposed."""
        identity = torch.eye(self.source, dtype=self.dtype, device="cpu")[None, None]
        size = (self.target, self.source)
        resized = F.interpolate(identity, size, mode="bicubic", align_corners=False, antialias=self.antialias)[0, 0]
        return resized.T if self.transposed else resized


class Band(NamedTuple):
    """Output entries `target` are `weight` times the input entries `source`."""

    target: slice
    source: slice
    weight: Tensor


@lru_cache(maxsize=128)
def bands(axis: Axis) -> tuple[Band, ...]:
    """The matrix of `axis` cut into blocks of rows, each without the zeros beside its band."""
    matrix = axis.matrix()
    found = []
    for start in range(0, len(matrix), BAND):
        rows = matrix[start : start + BAND]
        columns = rows.any(0).nonzero().flatten().tolist() or [0]
        source = slice(columns[0], columns[-1] + 1)
        weight = rows[:, source].contiguous().to(axis.device)
        found.append(Band(slice(start, start + len(rows)), source, weight))
    return tuple(found)


@lru_cache(maxsize=128)
def taps(axis: Axis) -> tuple[Tensor, Tensor]:
    """The matrix of `axis` as first [n_out] int32 and weight [taps, n_out], `taps` the most entries that a row spans.

    first + taps never exceeds n_in: a short row near the end begins earlier and carries zeros.
    """
    matrix = axis.matrix()
    n_in = matrix.shape[1]
    present = (matrix != 0).int()
    first, last = present.argmax(1), n_in - 1 - present.flip(1).argmax(1)
    last = torch.where(present.any(1), last, first)
    width = int((last - first).max()) + 1
    first.clamp_(max=n_in - width)
    weight = matrix.gather(1, first[:, None] + torch.arange(width, device="cpu"))
    return first.int().to(axis.device), weight.T.contiguous().to(axis.device)


class View(NamedTuple):
    """One scale: the small size and the resizes of (rows, columns) to it and back."""

    size: tuple[int, int]
    down: tuple[Axis, Axis]
    up: tuple[Axis, Axis]


def views_of(x: Tensor, scales: Sequence[float], antialias: bool, *, transposed: bool = False) -> list[View]:
    """`x` [..., H, W]. The small sides are int(side * scale), as SGA's code rounds."""

    def axis(source: int, target: int) -> Axis:
        return Axis(source, target, antialias, x.dtype, x.device, transposed)

    height, width = x.shape[-2:]
    return [
        View((h, w), (axis(height, h), axis(width, w)), (axis(h, height), axis(w, width)))
        for h, w in small_sizes(x, scales)
    ]


def small_sizes(x: Tensor, scales: Sequence[float]) -> list[tuple[int, int]]:
    return [(int(x.shape[-2] * scale), int(x.shape[-1] * scale)) for scale in scales]


def resize_reference(planes: Tensor, axes: tuple[Axis, Axis], out: Tensor | None = None) -> Tensor:
    """Planes [P, H, W] -> [P, h, w], columns first."""
    rows, columns = bands(axes[0]), bands(axes[1])
    half = planes.new_empty(*planes.shape[:2], columns[-1].target.stop)
    for band in columns:
        torch.mm(planes.flatten(0, 1)[:, band.source], band.weight.T, out=half.flatten(0, 1)[:, band.target])
    if out is None:
        out = planes.new_empty(len(planes), rows[-1].target.stop, half.shape[2])
    for band in rows:
        weight = band.weight.expand(len(planes), *band.weight.shape)
        torch.bmm(weight, half[:, band.source], out=out[:, band.target])
    return out


def view_reference(
    x: Tensor, noise: Tensor | None, view: View, bounds: tuple[float, float], outside: Tensor, out: Tensor
) -> None:
    """x, noise, out [P, H, W], outside [P, h, w] bool, where the clamp cut or met a NaN. Fills `outside` and `out`.

    A few planes at a time, so that what lies between two products stays in the cache.
    """
    for some in few_planes(x):
        small = resize_reference(x[some] if noise is None else x[some] + noise[some], view.down)
        clamped = small.clamp(*bounds)
        torch.ne(small, clamped, out=outside[some])
        resize_reference(clamped, view.up, out=out[some])


def view_backward_reference(grad: Tensor, outside: Tensor, view: View, out: Tensor) -> None:
    """Adds the gradient of one view's input to `out` [P, H, W]; `view` is transposed, shapes as in `view_reference`."""
    for some in few_planes(grad):
        small = resize_reference(grad[some], view.up).masked_fill_(outside[some], 0.0)
        out[some].add_(resize_reference(small, view.down))


def few_planes(planes: Tensor) -> Iterator[slice]:
    """As many of [P, H, W] at a time as have about PIXELS pixels."""
    size = max(1, PIXELS // max(1, planes[:1].numel()))
    return (slice(start, start + size) for start in range(0, len(planes), size))


def _view_triton(
    x: Tensor, noise: Tensor | None, view: View, bounds: tuple[float, float], outside: Tensor, out: Tensor
) -> None:
    from fastmat.kernels.views import launch_resize_axis

    half, small = x.new_empty(*x.shape[:2], view.size[1]), x.new_empty(outside.shape)
    launch_resize_axis(x, half, taps(view.down[1]), axis=1, noise=noise)
    launch_resize_axis(half, small, taps(view.down[0]), axis=0, outside=outside, bounds=bounds)
    half = x.new_empty(*small.shape[:2], x.shape[2])
    launch_resize_axis(small, half, taps(view.up[1]), axis=1)
    launch_resize_axis(half, out, taps(view.up[0]), axis=0)


def _view_backward_triton(grad: Tensor, outside: Tensor, view: View, out: Tensor) -> None:
    from fastmat.kernels.views import launch_resize_axis

    half, small = grad.new_empty(*grad.shape[:2], view.size[1]), grad.new_empty(outside.shape)
    launch_resize_axis(grad, half, taps(view.up[1]), axis=1)
    launch_resize_axis(half, small, taps(view.up[0]), axis=0, outside=outside)
    half = grad.new_empty(*small.shape[:2], grad.shape[2])
    launch_resize_axis(small, half, taps(view.down[1]), axis=1)
    launch_resize_axis(half, out, taps(view.down[0]), axis=0, accumulate=True)


def _split(outside: Tensor, planes: int, views: Sequence[View]) -> Iterator[Tensor]:
    """The flat record as one [planes, h, w] per view."""
    parts = outside.split([planes * view.size[0] * view.size[1] for view in views])
    return (part.view(planes, *view.size) for part, view in zip(parts, views, strict=True))


@torch.library.custom_op("fastmat::scale_views", mutates_args=())
def _scale_views(
    x: Tensor, scales: Sequence[float], noise: Tensor | None, antialias: bool, low: float, high: float, backend: str
) -> tuple[Tensor, Tensor]:
    """The views, and where their clamps cut: flat bool, view after view, all that the backward needs."""
    one_view = _view_triton if uses_triton(backend, x.device) else view_reference
    views = views_of(x, scales, antialias)
    planes = x.contiguous().flatten(0, 1)
    draws: Iterable[Tensor | None] = [None] * len(views) if noise is None else noise.contiguous().flatten(1, 2)
    out, outside = _outputs(x, scales)
    records = _split(outside, len(planes), views)
    for view, draw, record, target in zip(views, draws, records, out.flatten(1, 2), strict=True):
        one_view(planes, draw, view, (low, high), record, target)
    return out, outside


@_scale_views.register_fake
def _outputs(x: Tensor, scales: Sequence[float], *_: Tensor | float | str | None) -> tuple[Tensor, Tensor]:
    pixels = sum(height * width for height, width in small_sizes(x, scales))
    outside = x.new_empty(x.shape[0] * x.shape[1] * pixels, dtype=torch.bool)
    return x.new_empty(len(scales), *x.shape), outside


@torch.library.custom_op("fastmat::scale_views_backward", mutates_args=())
def _scale_views_backward(
    grad: Tensor, outside: Tensor, scales: Sequence[float], antialias: bool, per_view: bool, backend: str
) -> Tensor:
    """grad [S, B, C, H, W] -> the gradient of x + noise: [S, B, C, H, W] if per_view, else the sum, [1, B, C, H, W]."""
    one_view = _view_backward_triton if uses_triton(backend, grad.device) else view_backward_reference
    views = views_of(grad, scales, antialias, transposed=True)
    planes = grad.contiguous().flatten(1, 2)
    moved = grad.new_zeros(len(views) if per_view else 1, *grad.shape[1:])
    targets = moved.expand(grad.shape).flatten(1, 2)
    for seed, record, view, target in zip(planes, _split(outside, planes.shape[1], views), views, targets, strict=True):
        one_view(seed, record, view, target)
    return moved


@_scale_views_backward.register_fake
def _(grad: Tensor, outside: Tensor, scales: Sequence[float], antialias: bool, per_view: bool, backend: str) -> Tensor:
    return grad.new_empty(len(scales) if per_view else 1, *grad.shape[1:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, ctx.scales, _, ctx.antialias, _, _, ctx.backend = inputs
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    (outside,) = ctx.saved_tensors
    of_noise = ctx.needs_input_grad[2]
    moved = _scale_views_backward(grad, outside, ctx.scales, ctx.antialias, of_noise, ctx.backend)
    of_x = moved.sum(0) if of_noise else moved[0]
    return of_x, None, moved if of_noise else None, None, None, None, None


_scale_views.register_autograd(_backward, setup_context=_setup_context)


def scale_views(
    x: Tensor,
    scales: Sequence[float],
    noise: Tensor | None,
    *,
    antialias: bool,
    bounds: tuple[float, float] = (0.0, 1.0),
    backend: Backend | None = None,
) -> Tensor:
    """The scaled versions of `x`, [S, B, C, H, W]: bicubic to (int(H s), int(W s)), clamped to `bounds`, and back.

    x [B, C, H, W] fp32 (or fp64); scales: S positive factors; noise [S, B, C, H, W], added before resizing, or None.
    antialias: torchvision's `Resize(antialias=...)`, which changes what shrinks; its default differs between versions.
    A view is not clamped again, so it may leave the bounds a little, as in the published code.

    Equals torchvision's tensor resize to rounding; the gradient, of x and of noise where it is asked for, is the exact
    transpose, the same in every run, and passes the clamp where torch.clamp's does: inside and on the bounds. For the
    backward one byte per small pixel is kept, sum of s^2 per pixel of x, where autograd would keep the images.

    Bytes: see `fastmat.kernels.views`; on a CPU banded products of 32 rows, a fifth of the work of the whole matrices.
    Raises UserError (a ValueError) naming the argument, also for a scale that leaves no pixel.
    """
    check_dtype("x", x, (torch.float32, torch.float64))
    if x.dim() != 4:
        raise UserError(f"x must be [B, C, H, W], got shape {tuple(x.shape)}")
    if isinstance(scales, (float, int)):
        raise UserError(f"scales must be a sequence of factors, got {scales}")
    for scale in scales:
        check_positive("scales", scale)
    for scale, small in zip(scales, small_sizes(x, scales), strict=True):
        if min(small) < 1:
            raise UserError(f"scales must leave at least one pixel, but {scale} of {tuple(x.shape[-2:])} is {small}")
    if noise is not None:
        check_dtype("noise", noise, (x.dtype,))
        check_shape("noise", noise, (len(scales), *x.shape), "one per view, [S, B, C, H, W]")
        check_device(x.device, noise=noise)
    check_bounds(bounds)
    return _scale_views(x, [float(scale) for scale in scales], noise, antialias, *map(float, bounds), backend or "")[0]
