"""TeCoA against its formula written out: one image, one class at a time."""

import pytest
import torch
from defences.labelled_batch import LABELS, PROMPTS, class_features, labelled_batch
from training.synthetic import THREAT

from fastmat.attacks.draws import SeededDraws
from fastmat.defences.tecoa import TeCoA
from fastmat.models.tiny import tiny_clip
from fastmat.training.forward import encode_views


def cross_entropy(model, images):
    """Mean over images of -log softmax(logit_scale * cosine) at the label, in fp64."""
    classes, scale = class_features(model).double(), model.logit_scale.item()
    features = model.encode_image(images).features.double()
    total = 0.0
    for row, label in zip(features, LABELS, strict=True):
        logits = torch.stack([scale * (row * text).sum() for text in classes])
        total = total - (logits[label] - logits.exp().sum().log())
    return total / len(LABELS)


def test_loss_is_the_cross_entropy_over_all_classes():
    model, batch = tiny_clip().eval(), labelled_batch()
    defence = TeCoA(threat=THREAT, prompts=PROMPTS)
    views = defence.perturb(model, batch, SeededDraws(0))
    assert views.texts == {} and list(views.images) == ["adv"]
    assert views.targets["labels"].tolist() == list(LABELS)
    torch.testing.assert_close(views.targets["classes"], class_features(model))
    terms = defence.loss(encode_views(model, model, views, batch))
    assert list(terms) == ["classes"]
    torch.testing.assert_close(
        terms["classes"].double(), cross_entropy(model, views.images["adv"]), rtol=1e-5, atol=1e-6
    )


def test_attack_is_published_pgd_on_that_loss():
    """Two steps of eps along the sign of the gradient, from a uniform start, projected to ball and box."""
    model, batch = tiny_clip().eval(), labelled_batch()
    eps = THREAT.eps
    start = TeCoA(threat=THREAT, prompts=PROMPTS, steps=1, step_size=0.0).perturb(model, batch, SeededDraws(5))
    x = start.images["adv"]
    assert float((x - batch.images).abs().max()) > 0.9 * eps
    for _ in range(2):
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(cross_entropy(model, x), x)
        x = torch.minimum(torch.maximum(x + eps * gradient.sign(), batch.images - eps), batch.images + eps).clamp(0, 1)
    found = TeCoA(threat=THREAT, prompts=PROMPTS).perturb(model, batch, SeededDraws(5)).images["adv"]
    # A gradient next to zero may round to either sign.
    assert float(((found - x).abs() > 1e-5).float().mean()) < 1e-3


def test_prompts_are_encoded_once(monkeypatch: pytest.MonkeyPatch):
    model, batch = tiny_clip(), labelled_batch()
    defence = TeCoA(threat=THREAT, prompts=PROMPTS)
    calls = []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda tokens: calls.append(len(tokens.ids)) or encode(tokens))
    for seed in range(3):
        defence.perturb(model, batch, SeededDraws(seed))
    assert calls == [sum(map(len, PROMPTS))]
    other = tiny_clip(seed=1)
    assert not torch.equal(defence.perturb(other, batch, SeededDraws(0)).targets["classes"], class_features(model))
