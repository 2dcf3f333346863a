"""SGA's linear objective: the sum of cosines between an image and its own captions (Lu et al., ICCV 2023, eq. 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.errors import UserError
from fastmat.ops.arguments import FLOATS, check_device, check_dtype, check_ids
from fastmat.ops.backend import Backend, uses_triton


def cosine_to_set_reference(image_features: Tensor, text_features: Tensor, txt2img: Tensor) -> tuple[Tensor, Tensor]:
    """Value [B] and seed [B, E], the sum of each image's captions; arguments as in `cosine_to_set`."""
    images = len(image_features)
    _, seed = _outputs(image_features, text_features, txt2img)
    own, rows = _row(txt2img, images), text_features.to(seed.dtype)
    total = seed.new_zeros(images + 1, seed.shape[1])
    # Each adds in a fixed order where the other races: blocks on CUDA, threads on a CPU.
    if total.is_cuda:
        total.index_put_((own,), rows, accumulate=True)
    else:
        total.index_add_(0, own, rows)
    seed.copy_(total[:images])
    return (image_features * seed).sum(-1), seed


def _row(txt2img: Tensor, images: int) -> Tensor:
    """[T] the caption's image, or the row after the last where there is no such image."""
    return torch.where((txt2img >= 0) & (txt2img < images), txt2img, images)


@torch.library.custom_op("fastmat::cosine_to_set", mutates_args=())
def _cosine_to_set(
    image_features: Tensor, text_features: Tensor, txt2img: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    images = len(image_features)
    # Only where reading a value does not wait for a GPU.
    if txt2img.device.type == "cpu" and not (inside := (txt2img >= 0) & (txt2img < images)).all():
        wrong = int(txt2img[~inside][0])
        raise UserError(f"txt2img must be in [0, {images}), the rows of image_features, got {wrong}")
    if not uses_triton(backend, image_features.device):
        return cosine_to_set_reference(image_features, text_features, txt2img)
    from fastmat.kernels.cosine import launch_cosine_to_set

    value, seed = _outputs(image_features, text_features, txt2img)
    launch_cosine_to_set(image_features, text_features, txt2img.contiguous(), value, seed)
    return value, seed


def _outputs(image_features: Tensor, text_features: Tensor, *_: Tensor | str) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(image_features.dtype, text_features.dtype), torch.float32)
    shape = image_features.shape
    return image_features.new_empty(shape[0], dtype=dtype), image_features.new_empty(shape, dtype=dtype)


_cosine_to_set.register_fake(_outputs)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: tuple[Tensor, Tensor]) -> None:
    image_features, text_features, txt2img, _ = inputs
    ctx.save_for_backward(image_features, txt2img, output[1])
    ctx.text_dtype = text_features.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, of_value: Tensor | None, of_seed: Tensor | None) -> tuple[Tensor | None, ...]:
    """Plain differentiable PyTorch: two row-wise products and a gather, nothing to sum.

    The seed is an output as well, so what reaches it (in a second derivative) goes on to the captions.
    """
    image_features, txt2img, seed = ctx.saved_tensors
    of_image = of_text = None
    if of_value is not None:
        of_image = (of_value[:, None] * seed).to(image_features.dtype)
        product = of_value[:, None] * image_features
        of_seed = product if of_seed is None else of_seed + product
    if ctx.needs_input_grad[1] and of_seed is not None:
        of_text = F.pad(of_seed, (0, 0, 0, 1))[_row(txt2img, len(image_features))].to(ctx.text_dtype)
    return of_image, of_text, None, None


_cosine_to_set.register_autograd(_backward, setup_context=_setup_context)


def cosine_to_set(
    image_features: Tensor, text_features: Tensor, txt2img: Tensor, *, backend: Backend | None = None
) -> Tensor:
    """[B] sums over the captions of each image of <image, caption>.

    image_features [B, E], text_features [T, E] unit rows, each fp32, fp16, bf16 or fp64; txt2img [T] int64, the row of
    the caption's image. The value is fp32 (fp64 if a feature is), gradients have their feature's dtype. An image
    without captions gets 0. A txt2img outside [0, B) is an error on the CPU; on CUDA, where finding it would wait for
    the GPU, that caption counts nowhere.

    The captions are summed first: value_b = <image_b, seed_b>, d image_b = g_b seed_b, d text_t = g_b image_b at
    b = txt2img[t]. The B x T matrix never exists, every input is read once, and results are the same in every run.
    Raises UserError (a ValueError) naming the argument.
    """
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        check_dtype(name, features, (*FLOATS, torch.float64))
        if features.dim() != 2:
            raise UserError(f"{name} must be [rows, E], got shape {tuple(features.shape)}")
    if image_features.shape[1] != text_features.shape[1]:
        raise UserError(
            f"image_features and text_features must have equally long rows, got {image_features.shape[1]} and "
            f"{text_features.shape[1]}"
        )
    check_ids("txt2img", txt2img, len(text_features), "one image per caption")
    check_device(image_features.device, text_features=text_features, txt2img=txt2img)
    return _cosine_to_set(image_features, text_features, txt2img, backend or "")[0]
