"""The contrastive operator against open_clip's and ALBEF's recorded losses and gradients (golden set `losses`)."""

import math

import pytest
import torch
import torch.nn.functional as F
from golden import golden

from fastmat.ops import contrastive_loss, contrastive_rows

TAGS = [f"N{n}_D{d}" for n in (7, 33, 64) for d in (32, 64)]


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    assert actual.dtype == expected.dtype
    assert float((actual.detach() - expected).abs().max()) <= rtol * float(expected.abs().max())


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("loss", ["clip", "clip_dup", "infonce_multi_full"])
@pytest.mark.parametrize("tag", TAGS)
def test_loss_and_gradients(tag, loss, precision):
    meta, t = golden("losses")
    dtype = torch.float32 if precision == "f32" else torch.float64
    exact = precision == "f64"
    # The recorded multi-positive targets were rounded to fp32 even for fp64 inputs.
    rtol = (3e-7 if loss == "infonce_multi_full" else 1e-10) if exact else 1e-5
    image = t[f"{tag}.image"].to(dtype).requires_grad_(True)
    text = t[f"{tag}.text"].to(dtype).requires_grad_(True)
    columns = text[t[f"{tag}.dup_source"]] if loss == "clip_dup" else text
    group = t[f"{tag}.idx"] if loss == "infonce_multi_full" else torch.arange(len(image))
    key = f"{tag}.{loss}.{precision}"
    if loss == "infonce_multi_full":
        parameter = torch.tensor(meta["config"]["temp"], dtype=dtype, requires_grad=True)
        scale, name = 1 / parameter, "grad_temp"
    else:
        parameter = torch.tensor(meta["config"]["clip_logit_scale"], dtype=dtype, requires_grad=True)
        scale, name = parameter, "grad_logit_scale"
    value = contrastive_loss(
        F.normalize(image, dim=-1), F.normalize(columns, dim=-1), scale, image_group=group, text_group=group
    )
    close(value, t[f"{key}.loss"], rtol)
    gradients = torch.autograd.grad(value, (image, text, parameter))
    for gradient, wanted in zip(gradients, ("grad_image", "grad_text", name), strict=True):
        if f"{key}.{wanted}" in t:
            close(gradient, t[f"{key}.{wanted}"], 10 * rtol)


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("loss", ["infonce_multi", "itc_hard", "itc_soft"])
@pytest.mark.parametrize("tag", TAGS)
def test_against_constant_keys_with_and_without_a_queue(tag, loss, precision):
    """ALBEF's contrastive loss, also with soft targets: every positive counts, keys and queue carry no gradient."""
    meta, t = golden("losses")
    dtype = torch.float32 if precision == "f32" else torch.float64
    rtol = 1e-5 if precision == "f32" else 3e-7
    image = t[f"{tag}.image"].to(dtype).requires_grad_(True)
    text = t[f"{tag}.text"].to(dtype).requires_grad_(True)
    temp = torch.tensor(meta["config"]["temp"], dtype=dtype, requires_grad=True)
    group, queues, queue_group = t[f"{tag}.idx"], (None, None), None
    momentum = [F.normalize(t[f"{tag}.{side}_m"].to(dtype), dim=-1) for side in ("image", "text")]
    if loss == "infonce_multi":
        keys = [F.normalize(side.detach(), dim=-1) for side in (image, text)]
    else:
        keys, queue_group = momentum, t[f"{tag}.idx_queue"][0]
        queues = tuple(t[f"{tag}.{side}_queue"].to(dtype).T for side in ("image", "text"))
    value = (
        sum(
            contrastive_rows(
                F.normalize(query, dim=-1),
                key,
                1 / temp,
                row_group=group,
                column_group=group,
                soft_rows=soft if loss == "itc_soft" else None,
                soft_weight=meta["config"]["itc_soft_alpha"] if loss == "itc_soft" else 0.0,
                queue=queue,
                queue_group=queue_group,
            ).mean()
            for query, key, queue, soft in zip((image, text), keys[::-1], queues[::-1], momentum, strict=True)
        )
        / 2
    )
    key = f"{tag}.{loss}.{precision}"
    close(value, t[f"{key}.loss"], rtol)
    for gradient, wanted in zip(
        torch.autograd.grad(value, (image, text, temp)), ("image", "text", "temp"), strict=True
    ):
        if f"{key}.grad_{wanted}" in t:
            close(gradient, t[f"{key}.grad_{wanted}"], 10 * rtol)


def test_logits_stay_fp32_inside_autocast():
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(16, 32, generator=generator), dim=-1)
    columns = F.normalize(torch.randn(16, 32, generator=generator), dim=-1)
    group = torch.arange(16)
    plain = contrastive_loss(rows, columns, 100.0, image_group=group, text_group=group)
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive_loss(rows, columns, 100.0, image_group=group, text_group=group)
    assert math.isfinite(plain.item()) and torch.equal(inside, plain)
