"""Every defence: no trace, budgets, the promised objective, and losses against plain formulas."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training.synthetic import THREAT, SwapWord, make_batch, model_with_state

from fastmat.attacks.draws import SeededDraws
from fastmat.defences.fare import FARE
from fastmat.defences.finetune import FineTune
from fastmat.defences.mat import MAT
from fastmat.defences.tecoa_itr import TeCoAITR
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.training.forward import encode_views

DEFENCES = {
    "finetune": lambda model: FineTune(),
    "tecoa_itr": lambda model: TeCoAITR(threat=THREAT, steps=3),
    "fare": lambda model: FARE(threat=THREAT, teacher=model, steps=3),
    "mat": lambda model: MAT(threat=THREAT, text_search=SwapWord()),
    "mat_image_text": lambda model: MAT(threat=THREAT, text_search=SwapWord(), order="image_text"),
    "mat_independent": lambda model: MAT(threat=THREAT, text_search=SwapWord(), order="independent"),
}


@pytest.mark.parametrize("name", DEFENCES)
def test_perturb_leaves_no_trace(name):
    model = model_with_state()
    model.text_tower.eval()
    next(model.text_tower.parameters()).requires_grad_(False)
    defence = DEFENCES[name](model)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    batch = make_batch()
    images = batch.images.clone()
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002

    defence.perturb(model, batch, SeededDraws(0))

    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert np.array_equal(np.random.get_state()[1], streams[2])  # noqa: NPY002
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(batch.images, images)


@pytest.mark.parametrize("name", [name for name in DEFENCES if name != "finetune"])
def test_adversarial_images_spend_the_budget_and_no_more(name):
    model = tiny_clip()
    batch = make_batch()
    views = DEFENCES[name](model).perturb(model, batch, SeededDraws(0))
    adv = views.images["adv"]
    distance = (adv - batch.images).abs().flatten(1).amax(1)
    assert bool((distance <= THREAT.eps + 1e-6).all()) and bool((distance > 0.9 * THREAT.eps).all())
    assert adv.dtype == torch.float32 and adv.min() >= 0 and adv.max() <= 1
    assert not adv.requires_grad


@pytest.mark.parametrize("name", [name for name in DEFENCES if name != "finetune"])
def test_the_attack_raises_the_loss_it_trains_on(name):
    """Averaged over batches, the outer loss on the adversarial views is above the one on a random start (no steps)."""
    model = tiny_clip().eval()
    attacked = DEFENCES[name](model)
    idle = copy.deepcopy(attacked)
    if name == "fare":
        idle.steps = 0
    else:
        idle.attack.steps = 0
    totals = [0.0, 0.0]
    for seed in range(3):
        batch = make_batch(seed=seed)
        for i, defence in enumerate((attacked, idle)):
            views = defence.perturb(model, batch, SeededDraws(0))
            totals[i] += sum(v.item() for v in defence.loss(encode_views(model, model, views, batch)).values())
    assert totals[0] > totals[1]


def test_finetune_is_the_multi_positive_contrastive_loss():
    model = tiny_clip().eval()
    batch = make_batch()
    defence = FineTune()
    features = encode_views(model, model, defence.perturb(model, batch, SeededDraws(0)), batch)
    loss = defence.loss(features)["contrastive"]
    image, text = features.images["clean"].features, features.texts["clean"].features
    logits = (model.logit_scale * image @ text.T).double()
    positive = batch.group[:, None] == batch.text_group[None, :]
    rows = [-(logits[i].log_softmax(0)[positive[i]]).mean() for i in range(len(image))]
    columns = [-(logits[:, j].log_softmax(0)[positive[:, j]]).mean() for j in range(len(text))]
    expected = (torch.stack(rows).mean() + torch.stack(columns).mean()) / 2
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_finetune_without_shared_groups_is_clips_loss():
    model = tiny_clip().eval()
    batch = make_batch()
    keep = [batch.txt2img.tolist().index(i) for i in range(len(batch))]
    batch = type(batch)(
        images=batch.images,
        texts=tuple(batch.texts[t] for t in keep),
        txt2img=torch.arange(4),
        index=batch.index,
        group=torch.arange(4),
    )
    features = encode_views(model, model, FineTune().perturb(model, batch, SeededDraws(0)), batch)
    logits = model.logit_scale * features.images["clean"].features @ features.texts["clean"].features.T
    target = torch.arange(4)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(FineTune().loss(features)["contrastive"], expected)


def test_tecoa_takes_the_published_two_steps():
    defence = TeCoAITR(threat=THREAT, steps=2, step_size=THREAT.eps, trains=("image",))
    assert (defence.attack.steps, defence.attack.step_size, defence.trains) == (2, THREAT.eps, ("image",))
    default = TeCoAITR(threat=THREAT)
    assert (default.attack.steps, default.attack.step_size) == (10, THREAT.eps / 4)


def test_tecoa_pairs_adversarial_images_with_clean_texts():
    model = tiny_clip()
    batch = make_batch()
    views = TeCoAITR(threat=THREAT, steps=1).perturb(model, batch, SeededDraws(0))
    assert list(views.images) == ["adv"] and views.texts == {"clean": batch.texts}


def test_fare_keeps_its_own_teacher():
    model = tiny_clip().eval()
    defence = FARE(threat=THREAT, teacher=model)
    assert defence.step_size == THREAT.eps / 4 and defence.steps == 10 and defence.trains == ("image",)
    batch = make_batch()
    clean = model.encode_image(batch.images).embeds.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    views = defence.perturb(model, batch, SeededDraws(0))
    torch.testing.assert_close(views.targets["teacher"], clean)
    features = encode_views(model, model, views, batch)
    adv = model.encode_image(views.images["adv"]).embeds
    torch.testing.assert_close(defence.loss(features)["distance"], (adv - clean).pow(2).sum(1).mean())
    assert features.texts == {}


def test_fare_takes_one_plain_step_per_iteration():
    """One step from the start: x + step_size * sign of the gradient of the squared distance, by finite algebra."""
    model = tiny_clip().eval()
    batch = make_batch()
    teacher = tiny_clip(seed=1).eval()
    start = (
        FARE(threat=THREAT, teacher=teacher, steps=1, step_size=0.0).perturb(model, batch, SeededDraws(3)).images["adv"]
    )
    moved = FARE(threat=THREAT, teacher=teacher, steps=1).perturb(model, batch, SeededDraws(3)).images["adv"]
    x = start.clone().requires_grad_(True)
    distance = ((model.encode_image(x).embeds - teacher.encode_image(batch.images).embeds.detach()) ** 2).sum()
    (gradient,) = torch.autograd.grad(distance, x)
    expected = start + THREAT.eps / 4 * gradient.sign()
    expected = torch.minimum(torch.maximum(expected, batch.images - THREAT.eps), batch.images + THREAT.eps).clamp(0, 1)
    assert float((moved - expected).abs().max()) < 1e-6


@pytest.mark.parametrize("order", ["text_image", "image_text", "independent"])
def test_mat_order_decides_who_sees_what(order):
    model = tiny_clip().eval()
    batch = make_batch()
    search = SwapWord()
    seen = []

    class Spy:
        def bind(self, model, batch, context):
            seen.append((batch.texts, context))
            return lambda state: state.embeds.sum(-1)

    views = MAT(threat=THREAT, text_search=search, order=order, objective=Spy()).perturb(model, batch, SeededDraws(0))
    clean = model.encode_image(batch.images).features[batch.txt2img]
    adversarial = model.encode_image(views.images["adv"]).features[batch.txt2img]
    torch.testing.assert_close(search.guides[0], adversarial if order == "image_text" else clean)
    assert not torch.allclose(clean, adversarial, atol=1e-4)
    texts = views.texts["adv"]
    assert all(text.endswith("stone") for text in texts) and len(texts) == len(batch.texts)
    contrasted, context = seen[0]
    assert contrasted == (texts if order == "text_image" else batch.texts)
    expected = model.encode_text(model.tokenize(contrasted)).features
    torch.testing.assert_close(context.text_features, expected)
    torch.testing.assert_close(context.image_features, model.encode_image(batch.images).features)


def test_mat_encodes_only_weighted_views_and_weighs_them():
    model = tiny_clip().eval()
    batch = make_batch()
    defence = MAT(threat=THREAT, text_search=SwapWord(), pairs={"adv-clean": 0.5, "adv-adv": 2.0, "clean-clean": 0.0})
    views = defence.perturb(model, batch, SeededDraws(0))
    assert set(views.images) == {"adv"} and set(views.texts) == {"adv", "clean"}
    features = encode_views(model, model, views, batch)
    terms = defence.loss(features)
    one = TeCoAITR(threat=THREAT).loss(features)["contrastive"]
    torch.testing.assert_close(terms["contrastive/adv-clean"], 0.5 * one)
    only = MAT(threat=THREAT, text_search=SwapWord()).loss(features)
    assert list(only) == ["contrastive/adv-adv"]
    torch.testing.assert_close(terms["contrastive/adv-adv"], 2 * only["contrastive/adv-adv"])


def test_mat_defaults_are_two_half_steps():
    defence = MAT(threat=THREAT, text_search=SwapWord())
    assert (defence.attack.steps, defence.attack.step_size, defence.order) == (2, THREAT.eps / 2, "text_image")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"order": "text_imag"}, "did you mean 'text_image'"),
        ({"pairs": {"adv-advv": 1}}, "did you mean 'adv-adv'"),
        ({"pairs": {"adv-adv": -1}}, "must not be negative"),
        ({"pairs": {"adv-adv": 0}}, "positive weight"),
    ],
)
def test_mat_says_what_is_wrong(arguments, said):
    with pytest.raises(UserError, match=said):
        MAT(threat=THREAT, text_search=SwapWord(), **arguments)


def test_views_are_taken_apart_as_they_were_put_together():
    model = tiny_clip().eval()
    batch = make_batch()
    defence = MAT(threat=THREAT, text_search=SwapWord(), pairs={"clean-clean": 1, "adv-adv": 1})
    views = defence.perturb(model, batch, SeededDraws(0))
    calls = []

    def forward(images, tokens):
        calls.append((images, tokens))
        return model(images, tokens)

    features = encode_views(forward, model, views, batch)
    assert len(calls) == 1
    for name in ("clean", "adv"):
        expected = model.encode_image(views.images[name])
        torch.testing.assert_close(features.images[name].embeds, expected.embeds)
        torch.testing.assert_close(features.images[name].tokens, expected.tokens)
        expected = model.encode_text(model.tokenize(views.texts[name])).features
        torch.testing.assert_close(features.texts[name].features, expected)
