"""One axis of a resize as a gather of taps; four of them make a scale view, four others its gradient.

Resizing one axis is a product with a constant banded matrix, M [n_out, n_in]: row i has `taps` neighbours from column
first[i] on. The transposed matrix is banded as well, so the backward is the same kernel with other tables, every
output is written by one program, and the result is the same in every run (no atomics).

    out[p, i, n] = sum_k weight[k, i] * source[p, first[i] + k, n]        axis 0: rows
    out[p, m, i] = sum_k weight[k, i] * source[p, m, first[i] + k]        axis 1: columns

What stands beside the resizes is fused: noise is added where the source is read, the clamp and the record of what it
cut are written with the small image, the record is applied, and scales are summed, where gradients are written.

Launches: per scale 4 forward (columns and rows, down and up) and 4 backward; one program per BLOCK outputs of a plane.
Bytes per pixel of x for a scale s, in fp32, forward and backward alike: 12 + 16 s + 9 s^2 (x, noise and the view, or
the view's gradient and the sum over scales, read and written; two half-resized images and the small one, written and
read; one byte of record). Taps come from the L1 cache: 4 when enlarging, about 4 / s when shrinking with antialias.
Arithmetic is in the dtype of the images, fp32 or fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def resize_axis_kernel(
    source_ptr,
    noise_ptr,
    first_ptr,
    weight_ptr,
    outside_ptr,
    out_ptr,
    n_in,
    n_rows,
    n_columns,
    AXIS: tl.constexpr,
    TAPS: tl.constexpr,
    CLAMP: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n_out = n_rows * n_columns
    n_tiles = tl.cdiv(n_out, BLOCK)
    i_plane = (tl.program_id(0) // n_tiles).to(tl.int64)
    o_out = (tl.program_id(0) % n_tiles) * BLOCK + tl.arange(0, BLOCK)
    m_out = o_out < n_out
    o_row = o_out // n_columns
    o_column = o_out % n_columns

    # first + TAPS never exceeds n_in, and lanes beyond the plane read its first taps: no load leaves the source.
    if AXIS == 0:
        o_line, n_line, stride_tap, source_size = o_row, n_rows, n_columns, n_in * n_columns
        b_first = tl.load(first_ptr + o_line, mask=m_out, other=0)
        o_source = b_first * n_columns + o_column
    else:
        o_line, n_line, stride_tap, source_size = o_column, n_columns, 1, n_rows * n_in
        b_first = tl.load(first_ptr + o_line, mask=m_out, other=0)
        o_source = tl.where(m_out, o_row, 0) * n_in + b_first
    source_ptr += i_plane * source_size
    if noise_ptr is not None:
        noise_ptr += i_plane * source_size

    b_out = tl.zeros([BLOCK], dtype=out_ptr.dtype.element_ty)
    for k in range(TAPS):
        b_tap = tl.load(source_ptr + o_source + k * stride_tap)
        if noise_ptr is not None:
            b_tap += tl.load(noise_ptr + o_source + k * stride_tap)
        b_out += b_tap * tl.load(weight_ptr + k * n_line + o_line, mask=m_out, other=0.0)

    o_out = i_plane * n_out + o_out
    if CLAMP:
        # By comparisons, so that a NaN stays one and counts as outside, as in torch.clamp.
        m_inside = (b_out >= LOW) & (b_out <= HIGH)
        tl.store(outside_ptr + o_out, (~m_inside).to(tl.uint8), mask=m_out)
        b_out = tl.where(b_out < LOW, LOW, tl.where(b_out > HIGH, HIGH, b_out))
    elif outside_ptr is not None:
        b_out = tl.where(tl.load(outside_ptr + o_out, mask=m_out, other=1) != 0, 0.0, b_out)
    if ACCUMULATE:
        b_out += tl.load(out_ptr + o_out, mask=m_out, other=0.0)
    tl.store(out_ptr + o_out, b_out, mask=m_out)


def launch_resize_axis(
    source: torch.Tensor,
    out: torch.Tensor,
    taps: tuple[torch.Tensor, torch.Tensor],
    *,
    axis: int,
    noise: torch.Tensor | None = None,
    outside: torch.Tensor | None = None,
    bounds: tuple[float, float] | None = None,
    accumulate: bool = False,
    block: int = 1024,
) -> None:
    """Resize `source` [P, H, W] along one axis (0: H, 1: W) into `out`; all tensors contiguous, of one float dtype.

    taps: first [n_out] int32 and weight [taps, n_out]. noise: added to the source, of its shape.
    outside: bool, of `out`'s shape. With bounds, what the clamp to them cuts is recorded there; without, `out` is 0
        wherever it is set. accumulate: add to `out` instead of overwriting it.
    """
    if out.numel() == 0:
        return
    first, weight = taps
    planes, rows, columns = out.shape
    low, high = bounds or (0.0, 0.0)
    with torch.cuda.device_of(out):
        resize_axis_kernel[(planes * triton.cdiv(rows * columns, block),)](
            source_ptr=source,
            noise_ptr=noise,
            first_ptr=first,
            weight_ptr=weight,
            outside_ptr=None if outside is None else outside.view(torch.uint8),
            out_ptr=out,
            n_in=source.shape[1 + axis],
            n_rows=rows,
            n_columns=columns,
            AXIS=axis,
            TAPS=len(weight),
            CLAMP=bounds is not None,
            LOW=low,
            HIGH=high,
            ACCUMULATE=accumulate,
            BLOCK=block,
            enable_fp_fusion=True,
        )
