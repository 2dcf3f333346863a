"""The sum of each image's caption features, and its product with the image: SGA's objective and its gradient's seed.

    seed[b] = sum of text[t] over t with txt2img[t] = b       value[b] = <image[b], seed[b]>

One program per image scans `txt2img` in blocks and adds the rows that are its own, in their order: no [B, T] matrix,
no sorting, no atomics, the same result in every run. Bytes: text and image read once, the seed written once, and B
times 8 T for txt2img, which stays in the L2 cache. Inputs fp32, fp16, bf16 (or fp64); arithmetic in fp32 (fp64).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def cosine_to_set_kernel(
    image_ptr,
    text_ptr,
    txt2img_ptr,
    value_ptr,
    seed_ptr,
    n_texts,
    n_features,
    stride_ib,
    stride_ie,
    stride_tt,
    stride_te,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = seed_ptr.dtype.element_ty
    b_value = tl.zeros([BLOCK_E], dtype=dtype)
    i_e = 0
    while i_e < n_features:
        o_e = i_e + tl.arange(0, BLOCK_E)
        m_e = o_e < n_features
        b_seed = tl.zeros([BLOCK_E], dtype=dtype)
        i_t = 0
        while i_t < n_texts:
            o_t = i_t + tl.arange(0, BLOCK_T)
            m_t = tl.load(txt2img_ptr + o_t, mask=o_t < n_texts, other=-1) == i_b
            if tl.sum(m_t.to(tl.int32)) > 0:
                b_text = tl.load(
                    text_ptr + o_t.to(tl.int64)[:, None] * stride_tt + o_e.to(tl.int64)[None, :] * stride_te,
                    mask=m_t[:, None] & m_e[None, :],
                    other=0.0,
                )
                b_seed += tl.sum(b_text.to(dtype), 0)
            i_t += BLOCK_T
        tl.store(seed_ptr + i_b * n_features + o_e, b_seed, mask=m_e)
        b_image = tl.load(image_ptr + i_b * stride_ib + o_e.to(tl.int64) * stride_ie, mask=m_e, other=0.0)
        b_value += b_image.to(dtype) * b_seed
        i_e += BLOCK_E
    tl.store(value_ptr + i_b, tl.sum(b_value, 0))


def launch_cosine_to_set(
    image: torch.Tensor,
    text: torch.Tensor,
    txt2img: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor,
    *,
    block_t: int = 16,
    block_e: int = 256,
) -> None:
    """Fills value [B] and seed [B, E] from image [B, E], text [T, E] of any strides and contiguous txt2img [T] int64.

    A txt2img outside [0, B) belongs to no image.
    """
    if len(image) == 0:
        return
    with torch.cuda.device_of(image):
        cosine_to_set_kernel[(len(image),)](
            image_ptr=image,
            text_ptr=text,
            txt2img_ptr=txt2img,
            value_ptr=value,
            seed_ptr=seed,
            n_texts=len(text),
            n_features=image.shape[1],
            stride_ib=image.stride(0),
            stride_ie=image.stride(1),
            stride_tt=text.stride(0),
            stride_te=text.stride(1),
            BLOCK_T=block_t,
            BLOCK_E=block_e,
            enable_fp_fusion=True,
        )
