"""Sim-CLIP: symmetric cosine with a stop-gradient on either side, and what the released code makes of it."""

import copy

import torch
from training.synthetic import THREAT, make_batch

from fastmat.attacks.draws import SeededDraws
from fastmat.defences.fare import FARE
from fastmat.defences.sim_clip import SimCLIP
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.training.forward import encode_views


def cosine(a, b):
    """Mean cosine of raw embeddings, row by row."""
    return torch.stack([(x * y).sum() / (x.norm() * y.norm()) for x, y in zip(a, b, strict=True)]).mean()


def gradients(model, loss):
    parameters = [*model.image_tower.parameters(), *model.image_projection.parameters()]
    return torch.autograd.grad(loss, parameters)


def test_loss_and_its_gradient():
    model, batch = tiny_clip().eval(), make_batch()
    defence = SimCLIP(threat=THREAT)
    views = defence.perturb(model, batch, SeededDraws(0))
    assert views.texts == {} and views.targets == {}
    loss = defence.loss(encode_views(model, model, views, batch))["siamese"]
    clean, adv = (model.encode_image(views.images[name]).embeds for name in ("clean", "adv"))
    expected = -(cosine(adv, clean.detach()) + cosine(clean, adv.detach())) / 2
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_released_code_distils_the_frozen_original_at_half_weight():
    original, batch = tiny_clip().eval(), make_batch()
    defence = SimCLIP(threat=THREAT, teacher=original, quirks=Quirks(frozen_siamese=True))
    student = copy.deepcopy(original)
    with torch.no_grad():
        student.image_projection.weight.mul_(torch.linspace(0.5, 1.5, 16)[:, None])
    views = defence.perturb(student, batch, SeededDraws(0))
    assert list(views.images) == ["adv"]
    loss = defence.loss(encode_views(student, student, views, batch))["siamese"]
    target = original.encode_image(batch.images).embeds.detach()
    distilled = -cosine(student.encode_image(views.images["adv"]).embeds, target)
    torch.testing.assert_close(loss, distilled)
    for found, wanted in zip(gradients(student, loss), gradients(student, distilled / 2), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_attack_ascends_the_distance_to_its_own_clean_embedding():
    """That of FARE whose teacher is the model itself."""
    model, batch = tiny_clip().eval(), make_batch()
    found = SimCLIP(threat=THREAT).perturb(model, batch, SeededDraws(4)).images["adv"]
    expected = FARE(threat=THREAT, teacher=model).perturb(model, batch, SeededDraws(4)).images["adv"]
    assert torch.equal(found, expected)
    assert (SimCLIP(threat=THREAT).steps, SimCLIP(threat=THREAT).step_size) == (10, THREAT.eps / 4)
