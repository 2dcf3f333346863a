"""Scores as integer keys in the order of the shortlist: larger scores first, then smaller indices, NaN last.

Mathematics: a key is image(score) * 2^32 + (2^31 - 1 - index), where image maps fp32 to int32 in the same order, both
zeros to one value and NaN below everything. No two keys of a row are equal, so any top-k of keys is the only one.
The k best columns of a row lie in the k groups of GROUP neighbours whose best (score, smaller group) come first:
each of these has a column that stands before every column of the groups left out. Hence two kernels: the best of every
group, and, once the k groups are chosen, the keys of their columns.
Bytes: 4 per score read and 8 per GROUP scores written; then 4 + 8 per column of the chosen groups.
Dtypes: fp32 scores, int64 keys; no arithmetic on scores.
Launch: one program per row and BLOCK_G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 32


@triton.jit
def image_of(b_score):
    """int32 in the order of the scores; -2^31 for NaN, which no number has."""
    b_bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)
    b_image = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return tl.where(b_score == b_score, b_image, -2147483648)


@triton.jit
def group_kernel(
    scores_ptr, keys_ptr, n_columns, n_groups, stride_sm, stride_km, GROUP: tl.constexpr, BLOCK_G: tl.constexpr
):
    i_m = tl.program_id(0).to(tl.int64)
    o_g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    o_n = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    b_score = tl.load(scores_ptr + i_m * stride_sm + o_n, mask=o_n < n_columns, other=float("nan"))
    b_top = tl.max(image_of(b_score), axis=1).to(tl.int64)
    tl.store(keys_ptr + i_m * stride_km + o_g, (b_top << 32) | (0x7FFFFFFF - o_g), mask=o_g < n_groups)


@triton.jit
def column_kernel(
    scores_ptr,
    chosen_ptr,
    keys_ptr,
    n_columns,
    n_chosen,
    first_index,
    stride_sm,
    stride_cm,
    stride_km,
    ALL: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    m_c = o_c < n_chosen
    if ALL:
        b_group = o_c
    else:
        b_key = tl.load(chosen_ptr + i_m * stride_cm + o_c, mask=m_c, other=0)
        b_group = 0x7FFFFFFF - (b_key & 0x7FFFFFFF).to(tl.int32)
    o_i = tl.arange(0, GROUP)[None, :]
    o_n = b_group[:, None] * GROUP + o_i
    m_n = m_c[:, None] & (o_n < n_columns)
    b_score = tl.load(scores_ptr + i_m * stride_sm + o_n, mask=m_n, other=0.0)
    b_key = (image_of(b_score).to(tl.int64) << 32) | (0x7FFFFFFF - (o_n + first_index))
    # Beyond the last column: below the key of any NaN.
    b_key = tl.where(m_n, b_key, -9223372036854775808)
    tl.store(keys_ptr + i_m * stride_km + o_c[:, None] * GROUP + o_i, b_key, mask=m_c[:, None])


def launch_group_keys(scores: Tensor, keys: Tensor, *, block_g: int = 128) -> None:
    """Write keys [Q, ceil(N / GROUP)] of the groups of scores [Q, N] fp32, not empty; a key's index is the group's."""
    with torch.cuda.device_of(scores):
        group_kernel[(len(keys), triton.cdiv(keys.shape[1], block_g))](
            scores_ptr=scores,
            keys_ptr=keys,
            n_columns=scores.shape[1],
            n_groups=keys.shape[1],
            stride_sm=scores.stride(0),
            stride_km=keys.stride(0),
            GROUP=GROUP,
            BLOCK_G=block_g,
            num_warps=4,
            enable_fp_fusion=False,
        )


def launch_column_keys(
    scores: Tensor, chosen: Tensor | None, keys: Tensor, *, first_index: int, block_g: int = 128
) -> None:
    """Write keys [Q, C * GROUP] of the columns in the groups of `chosen` [Q, C], keys themselves (None: all, in order).

    Column n of scores [Q, N] fp32 has index first_index + n in the shortlist's count.
    """
    n_chosen = keys.shape[1] // GROUP
    with torch.cuda.device_of(scores):
        column_kernel[(len(keys), triton.cdiv(n_chosen, block_g))](
            scores_ptr=scores,
            chosen_ptr=chosen,
            keys_ptr=keys,
            n_columns=scores.shape[1],
            n_chosen=n_chosen,
            first_index=first_index,
            stride_sm=scores.stride(0),
            stride_cm=0 if chosen is None else chosen.stride(0),
            stride_km=keys.stride(0),
            ALL=chosen is None,
            GROUP=GROUP,
            BLOCK_G=block_g,
            num_warps=4,
            enable_fp_fusion=False,
        )
