"""Counter-based noise: Philox-4x64-10 (Salmon et al., SC 2011), the same bits on every backend.

The image with position i has the stream of philox(key=(seed, 0), counter=(c, stream, i, 0)), c = 1, 2, ...: NumPy's
`Philox(key=seed, counter=(0, stream, i, 0))`. Each counter gives eight 32-bit halves (low half of a word first); half k
of counter c is element k * eighth + c - 1 of the image, eighth = ceil(n / 8), so that every store is contiguous.
    uniform  2 (w + 1/2) / 2^23 - 1 with w the upper 23 bits: exact in fp32, symmetric, inside (-1, 1)
    normal   Box-Muller of the halves (2j, 2j + 1), as (w + 1/2) / 2^23 in (0, 1)

Bytes: 4 written per element, nothing read. Integers in uint64, the rest in fp32.
Launch: one program per image and BLOCK counters, flat grid.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def unit_interval(half):
    """32 bits, in a uint64, to fp32 in (0, 1), exactly."""
    return (((half >> 9) & 0x7FFFFF).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@triton.jit
def words(seed, o_c, index, STREAM: tl.constexpr):
    """Four uint64 blocks for the 0-based counters o_c."""
    b_c = o_c.to(tl.uint64) + 1
    b_zero = b_c * 0
    return tl.philox(seed, b_c, b_zero + STREAM, b_zero + index.to(tl.uint64), b_zero)


@triton.jit
def pair(word, NORMAL: tl.constexpr):
    """The two draws of one word."""
    b_u, b_v = unit_interval(word), unit_interval(word >> 32)
    if NORMAL:
        b_radius, b_angle = tl.sqrt(-2.0 * tl.log(b_u)), 6.283185307179586 * b_v
        b_u, b_v = b_radius * tl.cos(b_angle), b_radius * tl.sin(b_angle)
    else:
        b_u, b_v = 2.0 * b_u - 1.0, 2.0 * b_v - 1.0
    return b_u, b_v


@triton.jit
def noise_kernel(out_ptr, index_ptr, seed, n, eighth, n_blocks, NORMAL: tl.constexpr, BLOCK: tl.constexpr):
    i_m = tl.program_id(0)
    i_b = (i_m // n_blocks).to(tl.int64)
    o_c = (i_m % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    b_words = words(seed, o_c, tl.load(index_ptr + i_b), 0)
    out_ptr += i_b * n
    for k in tl.static_range(4):
        b_even, b_odd = pair(b_words[k], NORMAL)
        o_n = 2 * k * eighth + o_c
        tl.store(out_ptr + o_n, b_even, mask=(o_c < eighth) & (o_n < n))
        o_n += eighth
        tl.store(out_ptr + o_n, b_odd, mask=(o_c < eighth) & (o_n < n))


def launch_noise(out: torch.Tensor, index: torch.Tensor, seed: int, *, normal: bool, block: int = 512) -> None:
    """Fill out [B, n] fp32 contiguous; index [B] int64, seed a signed 64-bit key."""
    if not out.numel():
        return
    eighth = triton.cdiv(out.shape[1], 8)
    n_blocks = triton.cdiv(eighth, block)
    with torch.cuda.device_of(out):
        noise_kernel[(len(out) * n_blocks,)](
            out_ptr=out,
            index_ptr=index,
            seed=seed,
            n=out.shape[1],
            eighth=eighth,
            n_blocks=n_blocks,
            NORMAL=normal,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
        )
