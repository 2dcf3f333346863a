"""The rank of the best positive in every row of a matrix of scores.

Mathematics: with best = max of the row's positives, rank = #(not score <= best) + #(non-positives == best) // 2. The
positives of a row are a run of `order`, the columns sorted by group, so that a row is read once and no group is
compared: no positive is above best, and those equal to it are counted while best is searched.
Bytes: 4 per fp32 score, and 8 + 4 per positive.
Dtypes: only comparisons; scores of half precision are widened to fp32, fp64 stays.
Launch: one program per row; int32 counts per lane, summed once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rank_kernel(
    scores_ptr,
    order_ptr,
    first_ptr,
    count_ptr,
    ranks_ptr,
    n_columns,
    stride_sm,
    stride_sn,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    row_ptr = scores_ptr + i_m * stride_sm
    order_ptr += tl.load(first_ptr + i_m)
    count = tl.load(count_ptr + i_m)

    best = tl.full((), float("-inf"), DTYPE)
    own_ties = tl.full((), 0, tl.int32)
    broken = tl.full((), 0, tl.int32)
    i_k = tl.full((), 0, tl.int64)
    while i_k < count:
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < count
        b_column = tl.load(order_ptr + o_k, mask=m_k, other=0)
        b_own = tl.load(row_ptr + b_column * stride_sn, mask=m_k, other=float("-inf")).to(DTYPE)
        broken += tl.sum((b_own != b_own).to(tl.int32))
        b_own = tl.where(b_own == b_own, b_own, float("-inf"))
        top = tl.max(b_own)
        ties = tl.sum(((b_own == top) & m_k).to(tl.int32))
        own_ties = tl.where(top > best, ties, tl.where(top == best, own_ties + ties, own_ties))
        best = tl.where(top > best, top, best)
        i_k += BLOCK_K

    b_not_better = tl.zeros([BLOCK_N], tl.int32)
    b_ties = tl.zeros([BLOCK_N], tl.int32)
    i_n = tl.full((), 0, tl.int64)
    while i_n < n_columns:
        o_n = i_n + tl.arange(0, BLOCK_N)
        # What lies outside compares false with everything.
        b_score = tl.load(row_ptr + o_n * stride_sn, mask=o_n < n_columns, other=float("nan")).to(DTYPE)
        b_not_better += (b_score <= best).to(tl.int32)
        b_ties += (b_score == best).to(tl.int32)
        i_n += BLOCK_N
    better = n_columns - tl.sum(b_not_better.to(tl.int64))
    ties = tl.sum(b_ties.to(tl.int64)) - own_ties
    # A NaN among the positives: every other column stands before them.
    tl.store(ranks_ptr + i_m, tl.where(broken > 0, n_columns - count, better + ties // 2))


def launch_ranks(
    scores: Tensor,
    order: Tensor,
    first: Tensor,
    count: Tensor,
    ranks: Tensor,
    *,
    block_k: int = 32,
    block_n: int = 4096,
) -> None:
    """Write the ranks [Q] int64 of scores [Q, G] whose row i has the positives order[first[i] : first[i] + count[i]].

    scores may have any strides; the others are contiguous int64.
    """
    if not len(scores):
        return
    with torch.cuda.device_of(scores):
        rank_kernel[(len(scores),)](
            scores_ptr=scores,
            order_ptr=order,
            first_ptr=first,
            count_ptr=count,
            ranks_ptr=ranks,
            n_columns=scores.shape[1],
            stride_sm=scores.stride(0),
            stride_sn=scores.stride(1),
            DTYPE=tl.float64 if scores.dtype == torch.float64 else tl.float32,
            BLOCK_K=block_k,
            BLOCK_N=block_n,
            num_warps=8,
            enable_fp_fusion=False,
        )
