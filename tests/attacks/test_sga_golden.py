"""SGA and Sep-Attack against recordings of the published code on a small CLIP."""

from itertools import pairwise

import pytest
import torch
from golden import golden
from golden_models import golden_clip, golden_mlm
from recorded import RecordedDraws
from torch import Tensor

from fastmat.attacks.objectives import KLFromClean
from fastmat.attacks.sep import SepAttack
from fastmat.attacks.sga import SGA
from fastmat.ops import cosine_to_set, scale_views
from fastmat.quirks import Quirks
from fastmat.text.masked import MaskedCandidates
from fastmat.types import Batch, ThreatModel

SCALES = (0.5, 0.75, 1.25, 1.5)
THREAT = ThreatModel(eps=2 / 255, max_words=1)


def pairs(images: Tensor, texts: list[str], txt2img: list[int]) -> Batch:
    n = torch.arange(len(images))
    return Batch(images=images, texts=tuple(texts), txt2img=torch.tensor(txt2img), index=n, group=n)


def sga_case(name: str) -> tuple[dict, dict[str, Tensor], Batch, SGA, RecordedDraws]:
    inputs, tensors = golden("sga_inputs")
    expected, recorded = golden(name)
    noise = golden("sga_noise")[1]["scale_noise_int8"].float() / 512
    scales = SCALES if expected["config"]["scales"] else ()
    attack = SGA(
        threat=THREAT,
        candidates=MaskedCandidates(mlm=golden_mlm()),
        scales=scales,
        quirks=Quirks.official().but(antialias=expected["config"]["antialias"]),
    )
    draws = {"start": tensors["init_noise"] / THREAT.eps}
    draws |= {f"scale/{step}/{i}": noise[4 * step + i] / 0.05 for step in range(10) for i in range(len(scales))}
    batch = pairs(tensors["images_u8"] / 255, inputs["texts"], inputs["txt2img"])
    return expected, recorded, batch, attack, RecordedDraws(draws)


CASES = ["sga_noscales", "sga_scales_antialias", "sga_scales_noantialias"]


@pytest.mark.parametrize("name", CASES)
def test_sga_texts_and_images(name: str) -> None:
    expected, recorded, batch, attack, draws = sga_case(name)
    model = golden_clip()
    result = attack(model, batch, draws=draws)
    assert list(result.texts) == expected["texts_final"]
    assert ((result.images - recorded["adv_final"]).abs() > 1e-6).float().mean() <= 0.01
    torch.testing.assert_close(
        model.encode_image(result.images).features, recorded["adv_image_feat"], atol=1e-3, rtol=0
    )
    assert result.distance.max() == pytest.approx(2 / 255, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_sga_first_pass_and_what_the_image_attack_reads(name: str) -> None:
    expected, recorded, batch, attack, _ = sga_case(name)
    model = golden_clip()
    plan = attack.words.plan(model, batch.texts)
    first = attack.words.search(model, plan, recorded["clean_image_feat"][batch.txt2img])
    assert list(first) == expected["texts_pass1"]
    own = attack.words.features(model, first, max_length=attack.quirks.mid_max_length)
    torch.testing.assert_close(own, recorded["pass1_text_feat"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_sga_views_losses_and_gradient_signs_from_recorded_iterates(name: str) -> None:
    _, recorded, batch, attack, draws = sga_case(name)
    model = golden_clip().requires_grad_(False)
    x = recorded["adv_start"]
    for step in range(10):
        x = x.detach().requires_grad_(True)
        views = [x]
        if attack.scales:
            views += scale_views(x, attack.scales, attack.noise(batch, step, draws), antialias=attack.quirks.antialias)
        if step == 0 and "scaled_views_step0_image0" in recorded:
            first = torch.stack([view[0] for view in views])
            torch.testing.assert_close(first, recorded["scaled_views_step0_image0"], atol=1e-5, rtol=0)
        values = [
            cosine_to_set(model.encode_image(view).features, recorded["pass1_text_feat"], batch.txt2img)
            for view in views
        ]
        per_view = -torch.stack([value.mean() for value in values])
        torch.testing.assert_close(per_view, recorded["loss_per_view"][step], atol=1e-4, rtol=0)
        (gradient,) = torch.autograd.grad(-sum(value.sum() for value in values), x)
        sign = recorded["grad_sign"][step].float()
        assert (gradient.sign() == sign).float().mean() >= 0.995
        moved = x.detach() + 0.5 / 255 * sign
        x = (batch.images + (moved - batch.images).clamp(-2 / 255, 2 / 255)).clamp(0, 1)


def test_sep_attack() -> None:
    expected, recorded = golden("sepattack")
    images = golden("sga_inputs")[1]["images_u8"][recorded["pair_image_index"]] / 255
    attack = SepAttack(
        threat=THREAT, candidates=MaskedCandidates(mlm=golden_mlm()), quirks=Quirks.official(text_max_length=30)
    )
    batch = pairs(images, expected["texts"], list(range(len(images))))
    draws = RecordedDraws({"start": recorded["start_delta"] / THREAT.eps * 2 - 1})
    result = attack(golden_clip(), batch, draws=draws)
    assert list(result.texts) == expected["texts_adv"]
    assert ((result.images - recorded["adv_final"]).abs() > 1e-6).float().mean() <= 0.01


def test_sep_values_rise_as_recorded() -> None:
    expected, recorded = golden("sepattack")
    model = golden_clip().requires_grad_(False)
    images = golden("sga_inputs")[1]["images_u8"][recorded["pair_image_index"]] / 255
    batch = pairs(images, expected["texts"], list(range(len(images))))
    value = KLFromClean().bind(model, batch, None)
    step_size, eps = expected["config"]["step"], 2 / 255
    iterates = [images + recorded["start_delta"]]
    for sign in recorded["grad_sign"].float():
        moved = iterates[-1] + step_size * sign
        iterates.append((images + (moved - images).clamp(-eps, eps)).clamp(0, 1))
    found = [value(model.encode_image(x)).mean().item() for x in iterates[:-1]]
    assert found == pytest.approx(expected["loss_before_step"], rel=1e-3, abs=1e-6)
    assert all(b > a for a, b in pairwise(found))
