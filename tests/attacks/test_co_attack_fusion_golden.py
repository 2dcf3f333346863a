"""Co-Attack and Sep-Attack on a small ALBEF, uni-modal and on the fused token, against recordings of published code."""

import pytest
import torch
from golden import golden
from golden_models import golden_albef, golden_mlm
from recorded import RecordedDraws
from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.co_attack import CoAttack
from fastmat.attacks.fusion import plan_of
from fastmat.attacks.sep import SepAttack
from fastmat.models.albef import Albef
from fastmat.quirks import Quirks
from fastmat.text.masked import MaskedCandidates
from fastmat.types import Batch, ThreatModel

THREAT = ThreatModel(eps=2 / 255, max_words=1)
OFFICIAL = Quirks.official(round_trip=False, text_max_length=30)
FORMS = {
    "co_unimodal": (CoAttack, "cls"),
    "co_fusion": (CoAttack, "fusion"),
    "sep_unimodal": (SepAttack, "cls"),
    "sep_fusion": (SepAttack, "fusion"),
}


def recording(tmp_path, run: str) -> tuple[dict, dict[str, Tensor], Batch, Attack, Albef]:
    said, recorded = golden("coattack_albef")
    pairs = recorded["pair_image_index"]
    n = torch.arange(len(pairs))
    images = recorded["images_u8"][pairs] / 255
    batch = Batch(images=images, texts=tuple(said["texts"]), txt2img=n, index=n, group=n)
    attack, representation = FORMS[run]
    source = MaskedCandidates(mlm=golden_mlm())
    made = attack(threat=THREAT, candidates=source, representation=representation, quirks=OFFICIAL)
    model = golden_albef(tmp_path, "albef_attack_model")
    return said["runs"][run], recorded, batch, made, model


def objective(attack: Attack, model: Albef, batch: Batch, texts: list[str]):
    if isinstance(attack, CoAttack):
        return attack.bind(model, batch, None, texts)
    return attack.image.objective.bind(model, batch, None)


@pytest.mark.parametrize("run", FORMS)
def test_texts_and_images(tmp_path, run: str) -> None:
    expected, recorded, batch, attack, model = recording(tmp_path, run)
    result = attack(model, batch, draws=RecordedDraws({"start": recorded["start_delta"] / THREAT.eps * 2 - 1}))
    assert list(result.texts) == expected["texts_adv"]
    assert ((result.images - recorded[f"{run}.adv_final"]).abs() > 1e-6).float().mean() <= 0.01
    want = model.encode_image(recorded[f"{run}.adv_final"]).features
    torch.testing.assert_close(model.encode_image(result.images).features, want, atol=1e-3, rtol=0)
    assert result.distance.max() == pytest.approx(2 / 255, abs=1e-6)


@pytest.mark.parametrize("run", FORMS)
def test_values_and_gradients_along_the_recorded_run(tmp_path, run: str) -> None:
    expected, recorded, batch, attack, model = recording(tmp_path, run)
    model.requires_grad_(False)
    value = objective(attack, model, batch, expected["texts_adv"])
    x, step_size, found = batch.images + recorded["start_delta"], 1.25 * THREAT.eps / 10, []
    for step in range(10):
        x = x.detach().requires_grad_(True)
        values = value(model.encode_image(x))
        (gradient,) = torch.autograd.grad(values.sum(), x)
        found.append(values.mean().item())
        moved = x.detach() + step_size * gradient.sign()
        x = (batch.images + (moved - batch.images).clamp(-THREAT.eps, THREAT.eps)).clamp(0, 1)
        if step == 0:  # the recorded loss is a mean over the batch
            want = recorded[f"{run}.grad_step0"]
            scale = want.abs().max()
            torch.testing.assert_close(gradient[:1] / len(batch), want, atol=1e-4 * scale.item(), rtol=1e-3)
            assert ((x - recorded[f"{run}.adv_step1"]).abs() > 1e-6).float().mean() <= 0.005
    assert found == pytest.approx(expected["loss_before_step"], rel=1e-3)


@pytest.mark.parametrize("run", FORMS)
def test_clean_targets(tmp_path, run: str) -> None:
    _, recorded, batch, _, model = recording(tmp_path, run)
    with torch.no_grad():
        image = model.encode_image(batch.images)
        text = model.encode_text(model.tokenize(batch.texts))
        clean = image.tokens[:, 0] if run.endswith("unimodal") else model.fuse(image, text).tokens[:, 0]
    torch.testing.assert_close(clean, recorded[f"{run}.clean_target"], atol=1e-5, rtol=1e-5)


def test_normalised_images_would_change_texts(tmp_path) -> None:
    """The quirk decides two or three of the five texts, as the recordings say."""
    expected, _, batch, attack, model = recording(tmp_path, "co_fusion")
    texts = {}
    for raw in (True, False):
        attack.words.quirks = OFFICIAL.but(raw_images=raw)
        texts[raw] = attack.words.search(model, plan_of(attack.words, model, batch))
    assert list(texts[True]) == expected["texts_adv"]
    assert sum(a != b for a, b in zip(texts[True], texts[False], strict=True)) in (2, 3)
