"""FARE's and TeCoA's losses against the recordings of RobustVLM (golden sets `losses` and `fare_pgd`)."""

import pytest
import torch
import torch.nn.functional as F
from golden import golden
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from fastmat.attacks.objectives import squared_l2_from
from fastmat.defences.base import Features
from fastmat.defences.fare import FARE
from fastmat.models.protocol import ImageState
from fastmat.models.tiny import tiny_clip
from fastmat.ops import contrastive_rows, pgd_step
from fastmat.types import ThreatModel

TAGS = [f"N{n}_D{d}" for n in (7, 33, 64) for d in (32, 64)]
TOLERANCE = {"f32": 1e-5, "f64": 1e-10}


def state(embeds: torch.Tensor) -> ImageState:
    return ImageState(None, embeds, F.normalize(embeds, dim=-1))


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("tag", TAGS)
def test_fare_loss(tag, precision):
    _, t = golden("losses")
    dtype = torch.float32 if precision == "f32" else torch.float64
    image = t[f"{tag}.image"].to(dtype).requires_grad_(True)
    target = t[f"{tag}.text"].to(dtype)
    key = f"{tag}.fare.{precision}"
    rtol = TOLERANCE[precision]
    torch.testing.assert_close(squared_l2_from(target)(state(image)), t[f"{key}.per_sample"], rtol=rtol, atol=0)
    features = Features(
        images={"adv": state(image)},
        texts={},
        targets={"teacher": target},
        logit_scale=torch.tensor(1.0),
        group=torch.arange(len(image)),
        text_group=torch.arange(0),
    )
    loss = FARE(threat=ThreatModel(), teacher=tiny_clip()).loss(features)["distance"]
    torch.testing.assert_close(loss, t[f"{key}.loss"], rtol=rtol, atol=0)
    if f"{key}.grad_image" in t:
        (gradient,) = torch.autograd.grad(loss, image)
        expected = t[f"{key}.grad_image"]
        assert float((gradient - expected).abs().max()) <= 10 * rtol * float(expected.abs().max())


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("tag", TAGS)
def test_tecoa_loss(tag, precision):
    """Cross-entropy over class prompts is the image-to-text half of the operator, one prompt per group."""
    meta, t = golden("losses")
    dtype = torch.float32 if precision == "f32" else torch.float64
    image = t[f"{tag}.image"].to(dtype).requires_grad_(True)
    classes = t[f"{tag}.class_text"].to(dtype).T  # unit to fp32 as recorded
    rows = contrastive_rows(
        F.normalize(image, dim=-1),
        classes,
        meta["config"]["tecoa_logit_scale"],
        row_group=t[f"{tag}.labels"],
        column_group=torch.arange(meta["config"]["num_classes"]),
    )
    key = f"{tag}.tecoa.{precision}"
    rtol = TOLERANCE[precision]
    torch.testing.assert_close(rows, t[f"{key}.per_sample"], rtol=rtol, atol=rtol)
    torch.testing.assert_close(rows.mean(), t[f"{key}.loss"], rtol=rtol, atol=0)
    if f"{key}.grad_image" in t:
        (gradient,) = torch.autograd.grad(rows.mean(), image)
        expected = t[f"{key}.grad_image"]
        assert float((gradient - expected).abs().max()) <= 10 * rtol * float(expected.abs().max())


@pytest.mark.parametrize("case", ["rvlm_linf_l2loss", "rvlm_l2_l2loss"])
def test_fare_inner_loss_drives_the_recorded_iterates(case):
    """From every recorded iterate, our loss's gradient through the published momentum update gives the next one."""
    meta, t = golden("fare_pgd")
    recorded, weights = golden("pgd_model")
    attack = meta["attacks"][case]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    shape = ("image_size", "patch_size", "projection_dim", "layer_norm_eps")
    config = CLIPVisionConfig(**{name: recorded["config"][name] for name in sizes + shape})
    vision = CLIPVisionModelWithProjection(config).eval()
    prefix = "vision."
    vision.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    clean = weights["images_u8"].float() / 255
    value = squared_l2_from(weights["clean_embeds"])

    def normalised(v):
        return v.sign() if attack["norm"] == "linf" else v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    velocity = torch.zeros_like(clean)
    for before, after in zip(t[f"{case}.iterates"], t[f"{case}.iterates"][1:], strict=False):
        x = before.clone().requires_grad_(True)
        embeds = vision(pixel_values=(x - mean) / std).image_embeds
        (gradient,) = torch.autograd.grad(value(state(embeds)).sum(), x)
        velocity = normalised(attack["momentum"] * velocity + normalised(gradient))
        moved = pgd_step(before, velocity, clean, eps=attack["eps"], step_size=attack["stepsize"], norm=attack["norm"])
        share = ((moved - after).abs() > 1e-5).float().mean()
        assert float(share) <= 0.005
