"""A random start inside the eps ball and the pixel box, drawn by counter (kernels/noise.py) or handed in.

    Linf  x = clamp(x0 + eps u), u uniform in (-1, 1)
    L2    x = clamp(x0 + radius eps z / ||z||), z normal, radius uniform in (0, 1): first half of counter 1, stream 1

Bytes per element of fp32: 8 when drawn here (x0 read, x written), 12 when given; in L2 the draws are made twice, once
for their length, rather than stored. Lengths are summed in fp64, deterministically; no multiplication is fused with an
addition, so that in Linf every backend has the same bits.
Launch: as noise, one program per image and BLOCK counters, eight elements per counter.
"""

import torch
import triton
import triton.language as tl

from fastmat.kernels.noise import pair, unit_interval, words
from fastmat.kernels.pgd import clip, inverse, load_clean, per_image, total


@triton.jit
def draw_pair(draw_ptr, word, o_n, o_m, m_n, m_m, GIVEN: tl.constexpr, NORMAL: tl.constexpr):
    """The draws at o_n and o_m of one image."""
    if GIVEN:
        b_even = tl.load(draw_ptr + o_n, mask=m_n, other=0.0)
        b_odd = tl.load(draw_ptr + o_m, mask=m_m, other=0.0)
    else:
        b_even, b_odd = pair(word, NORMAL)
        b_even, b_odd = tl.where(m_n, b_even, 0.0), tl.where(m_m, b_odd, 0.0)
    return b_even, b_odd


@triton.jit
def start_length_kernel(
    draw_ptr, index_ptr, lengths_ptr, seed, n, eighth, n_blocks, GIVEN: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum of squared draws, per block."""
    i_m = tl.program_id(0)
    i_b = (i_m // n_blocks).to(tl.int64)
    o_c = (i_m % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    b_words = words(seed, o_c, tl.load(index_ptr + i_b), 0)
    draw_ptr += i_b * n
    length = tl.zeros((), tl.float64)
    for k in tl.static_range(4):
        o_n = 2 * k * eighth + o_c
        o_m = o_n + eighth
        m_n, m_m = (o_c < eighth) & (o_n < n), (o_c < eighth) & (o_m < n)
        b_even, b_odd = draw_pair(draw_ptr, b_words[k], o_n, o_m, m_n, m_m, GIVEN, True)
        b_even, b_odd = b_even.to(tl.float64), b_odd.to(tl.float64)
        length += tl.sum(b_even * b_even + b_odd * b_odd, 0)
    tl.store(lengths_ptr + i_m, length)


@triton.jit
def start_kernel(
    out_ptr, x0_ptr, draw_ptr, radius_ptr, index_ptr, lengths_ptr, eps, low, high, seed, n, eighth, n_blocks,
    L2: tl.constexpr, GIVEN: tl.constexpr, BYTE: tl.constexpr, EPS_EACH: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0)
    i_b = (i_m // n_blocks).to(tl.int64)
    o_c = (i_m % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + i_b)
    factor = per_image(eps, i_b, EPS_EACH)
    if L2:
        if GIVEN:
            factor *= tl.load(radius_ptr + i_b)
        else:
            first, _, _, _ = words(seed, tl.zeros((1,), tl.int32), index, 1)
            factor *= tl.sum(unit_interval(first), 0)
        factor *= inverse(tl.sqrt(total(lengths_ptr, i_b, n_blocks, 0, 1, PARTS)))
    b_words = words(seed, o_c, index, 0)
    draw_ptr += i_b * n
    x0_ptr += i_b * n
    out_ptr += i_b * n
    for k in tl.static_range(4):
        o_n = 2 * k * eighth + o_c
        o_m = o_n + eighth
        m_n, m_m = (o_c < eighth) & (o_n < n), (o_c < eighth) & (o_m < n)
        b_even, b_odd = draw_pair(draw_ptr, b_words[k], o_n, o_m, m_n, m_m, GIVEN, L2)
        tl.store(out_ptr + o_n, clip(b_even * factor + load_clean(x0_ptr, o_n, m_n, BYTE), low, high), mask=m_n)
        tl.store(out_ptr + o_m, clip(b_odd * factor + load_clean(x0_ptr, o_m, m_m, BYTE), low, high), mask=m_m)


def launch_start(
    out: torch.Tensor,
    x0: torch.Tensor,
    *,
    eps: float | torch.Tensor,
    norm: str,
    low: float,
    high: float,
    seed: int,
    index: torch.Tensor,
    draw: torch.Tensor | None,
    radius: torch.Tensor | None,
    block: int = 512,
) -> None:
    """Write out [B, n]; x0 and draw [B, n], radius and index [B], all contiguous; `draw` replaces the seed."""
    if not out.numel():
        return
    images, n = out.shape
    eighth = triton.cdiv(n, 8)
    n_blocks = triton.cdiv(eighth, block)
    grid = (images * n_blocks,)
    lengths = torch.empty(images * n_blocks if norm == "l2" else 0, dtype=torch.float64, device=out.device)
    common = {
        "draw_ptr": out if draw is None else draw,
        "index_ptr": index,
        "lengths_ptr": lengths,
        "seed": seed,
        "n": n,
        "eighth": eighth,
        "n_blocks": n_blocks,
        "GIVEN": draw is not None,
        "BLOCK": block,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }
    with torch.cuda.device_of(out):
        if norm == "l2":
            start_length_kernel[grid](**common)
        start_kernel[grid](
            out_ptr=out,
            x0_ptr=x0,
            radius_ptr=out if radius is None else radius,
            eps=eps,
            low=low,
            high=high,
            L2=norm == "l2",
            BYTE=x0.dtype == torch.uint8,
            EPS_EACH=isinstance(eps, torch.Tensor),
            PARTS=triton.next_power_of_2(n_blocks),
            **common,
        )
