"""Co-Attack against recordings of the published code on a small CLIP."""

import pytest
import torch
from golden import golden
from golden_models import golden_clip, golden_mlm
from recorded import RecordedDraws
from torch import Tensor

from fastmat.attacks.co_attack import CoAttack
from fastmat.text.masked import MaskedCandidates
from fastmat.types import Batch, ThreatModel

THREAT = ThreatModel(eps=2 / 255, max_words=1)


def recording() -> tuple[dict, dict[str, Tensor], Batch, CoAttack]:
    expected, recorded = golden("coattack")
    images = golden("sga_inputs")[1]["images_u8"][recorded["pair_image_index"]] / 255
    n = torch.arange(len(images))
    batch = Batch(images=images, texts=tuple(expected["texts"]), txt2img=n, index=n, group=n)
    return (
        expected,
        recorded,
        batch,
        CoAttack(threat=THREAT, candidates=MaskedCandidates(mlm=golden_mlm()), quirks=CoAttack.official),
    )


def test_settings_are_the_published_ones() -> None:
    expected, _, _, attack = recording()
    config = expected["config"]
    assert (attack.steps, attack.alpha_cross) == (config["iters"], config["alpha"])
    assert attack.step_size == pytest.approx(config["step"])
    source = attack.words.candidates
    assert isinstance(source, MaskedCandidates)
    assert (source.top_k, source.threshold) == (config["topk"], config["threshold"])
    assert attack.quirks.text_max_length == config["text_attack_max_length"]
    assert attack.quirks.mid_max_length == config["adv_text_reencode_max_length"]


def test_texts_and_images() -> None:
    expected, recorded, batch, attack = recording()
    model = golden_clip()
    result = attack(model, batch, draws=RecordedDraws({"start": recorded["start_delta"] / THREAT.eps * 2 - 1}))
    assert list(result.texts) == expected["texts_adv"]
    assert ((result.images - recorded["adv_final"]).abs() > 1e-6).float().mean() <= 0.01
    embeds = model.encode_image(recorded["adv_final"]).features
    torch.testing.assert_close(model.encode_image(result.images).features, embeds, atol=1e-3, rtol=0)
    assert result.distance.max() == pytest.approx(2 / 255, abs=1e-6)


def test_values_and_gradient_signs_from_recorded_iterates() -> None:
    expected, recorded, batch, attack = recording()
    model = golden_clip().requires_grad_(False)
    torch.testing.assert_close(
        model.encode_image(batch.images).embeds, recorded["clean_image_embed"], atol=1e-5, rtol=1e-5
    )
    value = attack.bind(model, batch, None, expected["texts_adv"])
    x = batch.images + recorded["start_delta"]
    found = []
    for step, sign in enumerate(recorded["grad_sign"].float()):
        x = x.detach().requires_grad_(True)
        values = value(model.encode_image(x))
        (gradient,) = torch.autograd.grad(values.sum(), x)
        found.append(values.mean().item())
        assert (gradient.sign() == sign).float().mean() >= 0.995
        if step == 0:  # the recorded loss is a mean over the batch
            scale = recorded["grad_step0"].abs().max()
            torch.testing.assert_close(gradient[:2] / len(batch), recorded["grad_step0"], atol=1e-4 * scale, rtol=1e-3)
        moved = x.detach() + attack.step_size * sign
        x = (batch.images + (moved - batch.images).clamp(-THREAT.eps, THREAT.eps)).clamp(0, 1)
        if step == 0:
            torch.testing.assert_close(x, recorded["adv_step1"], atol=1e-6, rtol=0)
    assert found == pytest.approx(expected["loss_before_step"], rel=1e-4)


def test_of_several_captions_the_last_one_makes_the_image() -> None:
    """The published evaluation keeps the image of the last pair: the same from one batch of whole images."""
    expected, recorded, pairs, attack = recording()
    owner = recorded["pair_image_index"].unique(return_inverse=True)[1]
    last = torch.tensor([int((owner == i).nonzero().max()) for i in range(int(owner.max()) + 1)])
    assert len(last) < len(owner) and bool((owner.diff() >= 0).all())
    batch = Batch(
        images=pairs.images[last], texts=pairs.texts, txt2img=owner, index=last, group=torch.arange(len(last))
    )
    result = attack(golden_clip(), batch, draws=RecordedDraws({"start": recorded["start_delta"] / THREAT.eps * 2 - 1}))
    assert list(result.texts) == expected["texts_adv"]
    assert ((result.images - recorded["adv_final"][last]).abs() > 1e-6).float().mean() <= 0.01
