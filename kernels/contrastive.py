"""Epilogues of a tile of logits: fold it into log-sum-exps, or turn it into the gradient of them.

Mathematics. A matrix product (cuBLAS) leaves raw products P [n, m] of a block of rows and a block of columns in a tile
that stays in the L2 cache; S = scale P. Two kernels finish it:

`fold` keeps, for each row and each column, a running maximum, sum of exponentials and sum of positive logits:
    max' = max(max, max_j S_ij);  sum' = sum exp(max - max') + sum_j exp(S_ij - max');  match' = match + sum_j+ S_ij
`weigh` writes, from the finished log-sum-exps and the incoming gradients a (of lse) and b (of match),
    W_ij = a_i exp(S_ij - lse_i) + a_j exp(S_ij - lse_j) + [i, j positive] (b_i + b_j)

The maximum runs with the tiles: a fixed bound such as the scale itself would underflow every exponential at scale 100
when the features are nearly orthogonal. Positives are pairs of equal int64 ids; no mask is ever stored.

Bytes moved per element of a tile, all of them in L2: fold 8 (read for the rows, read for the columns), weigh 8 (read
and write; 6 when it writes half precision for the next product). Vectors are read once per program.

Dtypes: tile, state and arithmetic fp32; weigh may store fp16 or bf16. A NaN in a tile makes its row's and its column's
sum NaN: maxima may skip it, sums cannot.

Launch: fold runs one program per 8 rows plus one per 8 columns, each walking the other side, so that no two programs
add to one sum and the result is the same in every run; weigh runs one program of 8 warps per 32 x 128 block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _fold_side(
    tile_ptr,
    scale,
    state_ptr,
    group_a_ptr,
    group_b_ptr,
    n_a,
    n_b,
    stride_ta,
    stride_tb,
    stride_s,
    i_a,
    NEGATIVES_ONLY: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    o_a = i_a * BLOCK_A + tl.arange(0, BLOCK_A)
    m_a = o_a < n_a
    b_ga = tl.load(group_a_ptr + o_a, mask=m_a, other=0)
    b_max = tl.load(state_ptr + o_a, mask=m_a, other=0.0)
    b_sum = tl.load(state_ptr + stride_s + o_a, mask=m_a, other=0.0)
    b_match = tl.load(state_ptr + 2 * stride_s + o_a, mask=m_a, other=0.0)
    start = 0
    while start < n_b:
        o_b = start + tl.arange(0, BLOCK_B)
        m_b = o_b < n_b
        m_ab = m_a[:, None] & m_b[None, :]
        o_t = o_a[:, None].to(tl.int64) * stride_ta + o_b[None, :].to(tl.int64) * stride_tb
        b_t = tl.load(tile_ptr + o_t, mask=m_ab, other=0.0) * scale
        b_gb = tl.load(group_b_ptr + o_b, mask=m_b, other=0)
        b_match += tl.sum(tl.where(b_ga[:, None] == b_gb[None, :], b_t, 0.0), axis=1)
        if NEGATIVES_ONLY:
            m_ab = m_ab & (b_ga[:, None] != b_gb[None, :])
        b_t = tl.where(m_ab, b_t, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_t, axis=1))
        # While nothing but -inf was seen, exp(-inf - -inf) would be NaN.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_t - b_shift[:, None]), axis=1)
        b_max = b_new
        start += BLOCK_B
    tl.store(state_ptr + o_a, b_max, mask=m_a)
    tl.store(state_ptr + stride_s + o_a, b_sum, mask=m_a)
    tl.store(state_ptr + 2 * stride_s + o_a, b_match, mask=m_a)


@triton.jit
def fold_kernel(
    tile_ptr,
    scale_ptr,
    row_ptr,
    column_ptr,
    row_group_ptr,
    column_group_ptr,
    n,
    m,
    stride_tn,
    stride_tm,
    stride_r,
    stride_c,
    row_programs,
    NEGATIVES_ONLY: tl.constexpr,
    ROW_BLOCK_N: tl.constexpr,
    ROW_BLOCK_M: tl.constexpr,
    COLUMN_BLOCK_N: tl.constexpr,
    COLUMN_BLOCK_M: tl.constexpr,
):
    i = tl.program_id(0)
    scale = tl.load(scale_ptr)
    if i < row_programs:
        _fold_side(
            tile_ptr,
            scale,
            row_ptr,
            row_group_ptr,
            column_group_ptr,
            n,
            m,
            stride_tn,
            stride_tm,
            stride_r,
            i,
            NEGATIVES_ONLY=NEGATIVES_ONLY,
            BLOCK_A=ROW_BLOCK_N,
            BLOCK_B=ROW_BLOCK_M,
        )
    else:
        _fold_side(
            tile_ptr,
            scale,
            column_ptr,
            column_group_ptr,
            row_group_ptr,
            m,
            n,
            stride_tm,
            stride_tn,
            stride_c,
            i - row_programs,
            NEGATIVES_ONLY=NEGATIVES_ONLY,
            BLOCK_A=COLUMN_BLOCK_M,
            BLOCK_B=COLUMN_BLOCK_N,
        )


@triton.jit
def weigh_kernel(
    tile_ptr,
    out_ptr,
    scale_ptr,
    row_ptr,
    column_ptr,
    row_group_ptr,
    column_group_ptr,
    n,
    m,
    stride_tn,
    stride_tm,
    stride_on,
    stride_om,
    stride_r,
    stride_c,
    COLUMNS: tl.constexpr,
    NEGATIVES_ONLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n, m_m = o_n < n, o_m < m
    m_nm = m_n[:, None] & m_m[None, :]
    o_n64, o_m64 = o_n[:, None].to(tl.int64), o_m[None, :].to(tl.int64)
    scale = tl.load(scale_ptr)
    b_t = tl.load(tile_ptr + o_n64 * stride_tn + o_m64 * stride_tm, mask=m_nm, other=0.0) * scale
    b_match = tl.load(row_ptr + 2 * stride_r + o_n, mask=m_n, other=0.0)[:, None]
    b_gn = tl.load(row_group_ptr + o_n, mask=m_n, other=0)
    b_gm = tl.load(column_group_ptr + o_m, mask=m_m, other=0)
    positive = b_gn[:, None] == b_gm[None, :]
    # Without NEGATIVES_ONLY no logit lies above its log-sum-exp; with it, the positives may, so they leave before exp.
    b_e = b_t
    if NEGATIVES_ONLY:
        b_e = tl.where(positive, float("-inf"), b_t)
    b_lse = tl.load(row_ptr + o_n, mask=m_n, other=0.0)
    b_grad = tl.load(row_ptr + stride_r + o_n, mask=m_n, other=0.0)
    b_w = b_grad[:, None] * tl.exp(b_e - b_lse[:, None])
    if COLUMNS:
        b_lse_m = tl.load(column_ptr + o_m, mask=m_m, other=0.0)
        b_grad_m = tl.load(column_ptr + stride_c + o_m, mask=m_m, other=0.0)
        b_w += b_grad_m[None, :] * tl.exp(b_e - b_lse_m[None, :])
        b_match += tl.load(column_ptr + 2 * stride_c + o_m, mask=m_m, other=0.0)[None, :]
    b_w += tl.where(positive, b_match, 0.0)
    tl.store(out_ptr + o_n64 * stride_on + o_m64 * stride_om, b_w.to(out_ptr.dtype.element_ty), mask=m_nm)


def launch_fold(
    tile: Tensor,
    scale: Tensor,
    row_state: Tensor,
    column_state: Tensor | None,
    row_group: Tensor,
    column_group: Tensor,
    negatives_only: bool,
    *,
    block: int = 4096,
    lines: int = 8,
) -> None:
    """Fold a tile of raw products [n, m] into row_state [3, n] and column_state [3, m]: maximum, sum, match.

    scale [] on the device; groups [n], [m] int64. column_state None: rows only.
    block: elements a program holds at once. lines: the most rows it has, and the fewest columns (8 fp32 are a sector).
    """
    n, m = tile.shape
    # Fewer rows each where there are few: a wide tile still fills the machine.
    height = min(lines, triton.next_power_of_2(triton.cdiv(n, 128)))
    depth = min(block // lines, triton.next_power_of_2(n))
    width = min(block // depth, triton.next_power_of_2(m))
    row_programs = triton.cdiv(n, height)
    column_programs = 0 if column_state is None else triton.cdiv(m, width)
    columns = row_state if column_state is None else column_state
    with torch.cuda.device_of(tile):
        fold_kernel[(row_programs + column_programs,)](
            tile_ptr=tile,
            scale_ptr=scale,
            row_ptr=row_state,
            column_ptr=columns,
            row_group_ptr=row_group,
            column_group_ptr=column_group,
            n=n,
            m=m,
            stride_tn=tile.stride(0),
            stride_tm=tile.stride(1),
            stride_r=row_state.stride(0),
            stride_c=columns.stride(0),
            row_programs=row_programs,
            NEGATIVES_ONLY=negatives_only,
            ROW_BLOCK_N=height,
            ROW_BLOCK_M=min(block // height, triton.next_power_of_2(m)),
            COLUMN_BLOCK_N=depth,
            COLUMN_BLOCK_M=width,
            enable_fp_fusion=True,
        )


def launch_weigh(
    tile: Tensor,
    out: Tensor,
    scale: Tensor,
    row_state: Tensor,
    column_state: Tensor | None,
    row_group: Tensor,
    column_group: Tensor,
    negatives_only: bool,
    *,
    block_n: int = 32,
    block_m: int = 128,
) -> None:
    """Write the gradient of a tile of raw products [n, m] with respect to its logits into out [n, m] (may be the tile).

    row_state [3, n], column_state [3, m] or None: log-sum-exp (finite), its gradient, the gradient of match.
    """
    n, m = tile.shape
    columns = row_state if column_state is None else column_state
    with torch.cuda.device_of(tile):
        weigh_kernel[(triton.cdiv(n, block_n), triton.cdiv(m, block_m))](
            tile_ptr=tile,
            out_ptr=out,
            scale_ptr=scale,
            row_ptr=row_state,
            column_ptr=columns,
            row_group_ptr=row_group,
            column_group_ptr=column_group,
            n=n,
            m=m,
            stride_tn=tile.stride(0),
            stride_tm=tile.stride(1),
            stride_on=out.stride(0),
            stride_om=out.stride(1),
            stride_r=row_state.stride(0),
            stride_c=columns.stride(0),
            COLUMNS=column_state is not None,
            NEGATIVES_ONLY=negatives_only,
            BLOCK_N=block_n,
            BLOCK_M=block_m,
            num_warps=8,
            enable_fp_fusion=True,
        )
