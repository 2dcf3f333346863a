"""One projected-gradient update: direction, step, projection to the eps ball around x0, clamp to the pixel box.

    source     g                                        plain
               v <- decay v + g / mean|g|               rule "mi"
               v <- unit(decay v + unit(g))             rule "fare"
    unit       sign (Linf), or per image g / ||g||_2 (L2)
    z          P(x + step_size unit(source))
    result     z, or with the previous iterate p (APGD) P(x + inertia (z - x) + (1 - inertia) (x - p)); p <- x
P clips to |. - x0| <= eps (Linf) or rescales to ||. - x0|| <= eps (L2), then clamps to [low, high].

A component NaN has sign 0. Where a whole image is normalised, a gradient whose length is not finite, or below 1e-30,
moves nothing and adds nothing to v.

Passes over one image tensor of 4 bytes per element (a half gradient or a byte x0 count for less):
             Linf                      L2
    plain    4: x g x0 | x             7: 3 for the lengths, then as Linf
    mi       7: g, x g x0 v | x v      11
    fare     6: x g x0 v | x v         11
    APGD     6: x g x0 p | x p         13
Lengths are summed in fp64, block by block and then in the order of the blocks: deterministic, and large or tiny
gradients neither overflow nor vanish. Everything else is fp32, and no multiplication is fused with an addition: an
attack in Linf takes the same steps on a GPU and on a CPU.
Launch: one program per image and BLOCK elements, flat grid; nothing waits for the host.
"""

import torch
import triton
import triton.language as tl

RULES = {"": 0, "mi": 1, "fare": 2}


@triton.jit
def sign(b):
    return tl.where(b > 0, 1.0, tl.where(b < 0, -1.0, 0.0))


@triton.jit
def clip(b, low, high):
    """Not tl.clamp: what that makes of NaN depends on the version."""
    return tl.where(b < low, low, tl.where(b > high, high, b))


@triton.jit
def inverse(length):
    """1 / length as fp32; 0 says that the vector has no usable direction."""
    return tl.where((length > 1e-30) & (length < 3e38), 1.0 / length, 0.0).to(tl.float32)


@triton.jit
def scaled(b, factor):
    return tl.where(factor > 0, b * factor, 0.0)


@triton.jit
def total(sums_ptr, i_b, n_blocks, j, K: tl.constexpr, PARTS: tl.constexpr):
    """The j-th of K sums of image i_b over its blocks."""
    o_p = tl.arange(0, PARTS)
    return tl.sum(tl.load(sums_ptr + (i_b * n_blocks + o_p) * K + j, mask=o_p < n_blocks, other=0.0), 0)


@triton.jit
def per_image(value, i_b, EACH: tl.constexpr):
    """A number, or the image's entry of a [B] tensor; never below zero."""
    number = tl.load(value + i_b).to(tl.float32) if EACH else value
    return tl.where(number > 0, number, 0.0)


@triton.jit
def load_clean(x0_ptr, o, m, BYTE: tl.constexpr):
    b_x0 = tl.load(x0_ptr + o, mask=m, other=0).to(tl.float32)
    if BYTE:
        b_x0 = tl.div_rn(b_x0, tl.full(b_x0.shape, 255.0, tl.float32))
    return b_x0


@triton.jit
def load_source(
    grad_ptr, velocity_ptr, first_ptr, o, m, i_b, n, n_blocks, decay,
    L2: tl.constexpr, RULE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    b_g = tl.load(grad_ptr + o, mask=m, other=0.0).to(tl.float32)
    if RULE != 0:
        b_v = decay * tl.load(velocity_ptr + o, mask=m, other=0.0)
        if RULE == 1:
            b_g = b_v + scaled(b_g, inverse(total(first_ptr, i_b, n_blocks, 0, 1, PARTS) / n))
        elif L2:
            b_g = b_v + scaled(b_g, inverse(tl.sqrt(total(first_ptr, i_b, n_blocks, 0, 1, PARTS))))
        else:
            b_g = b_v + sign(b_g)
    return b_g


@triton.jit
def stepped(
    b_x, b_x0, b_source, lengths_ptr, i_b, n_blocks, eps, step_size, low, high,
    L2: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """z and the unit direction that led to it."""
    if L2:
        source_sq = total(lengths_ptr, i_b, n_blocks, 0, 3, PARTS)
        product = total(lengths_ptr, i_b, n_blocks, 1, 3, PARTS)
        delta_sq = total(lengths_ptr, i_b, n_blocks, 2, 3, PARTS)
        factor = inverse(tl.sqrt(source_sq))
        # ||delta + step unit||^2, without another pass over the image.
        along = step_size.to(tl.float64) * factor
        moved_sq = tl.where(factor > 0, delta_sq + along * (2.0 * product + along * source_sq), delta_sq)
        b_unit = scaled(b_source, factor)
        b_z = ball_l2(b_x - b_x0 + step_size * b_unit, moved_sq, eps) + b_x0
    else:
        b_unit = sign(b_source)
        b_z = clip(b_unit * step_size + b_x - b_x0, -eps, eps) + b_x0
    return clip(b_z, low, high), b_unit


@triton.jit
def ball_l2(b_delta, length_sq, eps):
    return b_delta * tl.where(length_sq > eps.to(tl.float64) * eps, eps / tl.sqrt(length_sq), 1.0).to(tl.float32)


@triton.jit
def blended(b_x, b_z, previous_ptr, o, m, inertia, rest):
    return (b_z - b_x) * inertia + b_x + (b_x - tl.load(previous_ptr + o, mask=m, other=0.0)) * rest


@triton.jit
def gradient_length_kernel(grad_ptr, first_ptr, n, n_blocks, RULE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of |g| (mi) or of g^2 (fare), per block."""
    i_m = tl.program_id(0)
    o_n = (i_m % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    o = (i_m // n_blocks).to(tl.int64) * n + o_n
    b_g = tl.load(grad_ptr + o, mask=o_n < n, other=0.0).to(tl.float64)
    tl.store(first_ptr + i_m, tl.sum(tl.abs(b_g) if RULE == 1 else b_g * b_g, 0))


@triton.jit
def step_length_kernel(
    x_ptr, grad_ptr, x0_ptr, velocity_ptr, first_ptr, lengths_ptr, n, n_blocks, decay,
    RULE: tl.constexpr, BYTE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of source^2, source * delta and delta^2, per block (L2)."""
    i_m = tl.program_id(0)
    i_b = (i_m // n_blocks).to(tl.int64)
    o_n = (i_m % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    o, m = i_b * n + o_n, o_n < n
    b_source = load_source(grad_ptr, velocity_ptr, first_ptr, o, m, i_b, n, n_blocks, decay, True, RULE, PARTS)
    b_source = b_source.to(tl.float64)
    b_delta = tl.load(x_ptr + o, mask=m, other=0.0) - load_clean(x0_ptr, o, m, BYTE)
    b_delta = b_delta.to(tl.float64)
    lengths_ptr += i_m.to(tl.int64) * 3
    tl.store(lengths_ptr, tl.sum(b_source * b_source, 0))
    tl.store(lengths_ptr + 1, tl.sum(b_source * b_delta, 0))
    tl.store(lengths_ptr + 2, tl.sum(b_delta * b_delta, 0))


@triton.jit
def blend_length_kernel(
    x_ptr, grad_ptr, x0_ptr, previous_ptr, lengths_ptr, last_ptr, eps, step_size, low, high, inertia, rest, n, n_blocks,
    BYTE: tl.constexpr, EPS_EACH: tl.constexpr, STEP_EACH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of (x + inertia (z - x) + (1 - inertia) (x - p) - x0)^2, per block (APGD in L2)."""
    i_m = tl.program_id(0)
    i_b = (i_m // n_blocks).to(tl.int64)
    o_n = (i_m % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    o, m = i_b * n + o_n, o_n < n
    b_x = tl.load(x_ptr + o, mask=m, other=0.0)
    b_x0 = load_clean(x0_ptr, o, m, BYTE)
    b_source = tl.load(grad_ptr + o, mask=m, other=0.0).to(tl.float32)
    b_eps, b_step = per_image(eps, i_b, EPS_EACH), per_image(step_size, i_b, STEP_EACH)
    b_z, _ = stepped(b_x, b_x0, b_source, lengths_ptr, i_b, n_blocks, b_eps, b_step, low, high, True, PARTS)
    b_delta = tl.where(m, blended(b_x, b_z, previous_ptr, o, m, inertia, rest) - b_x0, 0.0).to(tl.float64)
    tl.store(last_ptr + i_m, tl.sum(b_delta * b_delta, 0))


@triton.jit
def pgd_update_kernel(
    out_ptr, x_ptr, grad_ptr, x0_ptr, velocity_ptr, previous_ptr, first_ptr, lengths_ptr, last_ptr,
    eps, step_size, low, high, decay, inertia, rest, n, n_blocks,
    L2: tl.constexpr, RULE: tl.constexpr, APGD: tl.constexpr, BYTE: tl.constexpr,
    EPS_EACH: tl.constexpr, STEP_EACH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0)
    i_b = (i_m // n_blocks).to(tl.int64)
    o_n = (i_m % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    o, m = i_b * n + o_n, o_n < n
    b_x = tl.load(x_ptr + o, mask=m, other=0.0)
    b_x0 = load_clean(x0_ptr, o, m, BYTE)
    b_source = load_source(grad_ptr, velocity_ptr, first_ptr, o, m, i_b, n, n_blocks, decay, L2, RULE, PARTS)
    b_eps, b_step = per_image(eps, i_b, EPS_EACH), per_image(step_size, i_b, STEP_EACH)
    b_z, b_unit = stepped(b_x, b_x0, b_source, lengths_ptr, i_b, n_blocks, b_eps, b_step, low, high, L2, PARTS)
    if RULE == 1:
        tl.store(velocity_ptr + o, b_source, mask=m)
    elif RULE == 2:
        tl.store(velocity_ptr + o, b_unit, mask=m)
    if APGD:
        b_delta = blended(b_x, b_z, previous_ptr, o, m, inertia, rest) - b_x0
        if L2:
            b_delta = ball_l2(b_delta, total(last_ptr, i_b, n_blocks, 0, 1, PARTS), b_eps)
        else:
            b_delta = clip(b_delta, -b_eps, b_eps)
        b_z = clip(b_delta + b_x0, low, high)
        tl.store(previous_ptr + o, b_x, mask=m)
    tl.store(out_ptr + o, b_z, mask=m)


def launch_pgd_update(
    out: torch.Tensor,
    x: torch.Tensor,
    grad: torch.Tensor,
    x0: torch.Tensor,
    *,
    eps: float | torch.Tensor,
    step_size: float | torch.Tensor,
    norm: str,
    low: float,
    high: float,
    velocity: torch.Tensor | None = None,
    decay: float = 0.0,
    rule: str = "",
    previous: torch.Tensor | None = None,
    inertia: float = 1.0,
    block: int = 4096,
) -> None:
    """Write out [B, n], and velocity or previous in place; all contiguous; `out` may be `x`.

    eps, step_size: numbers, or [B] on the device of x. `velocity` and `previous` exclude each other.
    """
    if not out.numel():
        return
    images, n = out.shape
    n_blocks = triton.cdiv(n, block)
    grid = (images * n_blocks,)
    l2, byte, code = norm == "l2", x0.dtype == torch.uint8, RULES[rule]
    sums = torch.empty(5 if l2 else 1, images * n_blocks, dtype=torch.float64, device=out.device)
    first, lengths, last = sums[0], sums[1:4], sums[-1]  # unused ones are never read
    each = {"EPS_EACH": isinstance(eps, torch.Tensor), "STEP_EACH": isinstance(step_size, torch.Tensor)}
    common = {"n": n, "n_blocks": n_blocks, "BLOCK": block, "num_warps": 8, "enable_fp_fusion": False}
    parts = triton.next_power_of_2(n_blocks)
    step = {"eps": eps, "step_size": step_size, "low": low, "high": high, "inertia": inertia, "rest": 1 - inertia}
    with torch.cuda.device_of(out):
        if rule == "mi" or (rule and l2):
            gradient_length_kernel[grid](grad_ptr=grad, first_ptr=first, RULE=code, **common)
        if l2:
            step_length_kernel[grid](
                x_ptr=x,
                grad_ptr=grad,
                x0_ptr=x0,
                velocity_ptr=out if velocity is None else velocity,
                first_ptr=first,
                lengths_ptr=lengths,
                decay=decay,
                RULE=code,
                BYTE=byte,
                PARTS=parts,
                **common,
            )
        if l2 and previous is not None:
            blend_length_kernel[grid](
                x_ptr=x,
                grad_ptr=grad,
                x0_ptr=x0,
                previous_ptr=previous,
                lengths_ptr=lengths,
                last_ptr=last,
                BYTE=byte,
                PARTS=parts,
                **step,
                **each,
                **common,
            )
        pgd_update_kernel[grid](
            out_ptr=out,
            x_ptr=x,
            grad_ptr=grad,
            x0_ptr=x0,
            velocity_ptr=out if velocity is None else velocity,
            previous_ptr=out if previous is None else previous,
            first_ptr=first,
            lengths_ptr=lengths,
            last_ptr=last,
            decay=decay,
            L2=l2,
            RULE=code,
            APGD=previous is not None,
            BYTE=byte,
            PARTS=parts,
            **step,
            **each,
            **common,
        )
