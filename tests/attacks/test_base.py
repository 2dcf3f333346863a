from dataclasses import replace
from functools import partial

import pytest
import torch
from batches import random_batch
from tiny_mlm import tiny_candidates

from fastmat.attacks.base import Attack, context_of, within_budget, words_changed
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.mi_fgsm import MIFGSM
from fastmat.attacks.objectives import Contrastive, CosineToOwn, KLFromClean, SquaredL2FromClean
from fastmat.attacks.pgd import PGD
from fastmat.attacks.search import random_start
from fastmat.attacks.sep import SepAttack
from fastmat.attacks.sga import SGA
from fastmat.attacks.word_substitution import WordSubstitution
from fastmat.defences.fare import FARE
from fastmat.defences.mat import MAT
from fastmat.defences.tecoa_itr import TeCoAITR
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.types import ThreatModel

OBJECTIVES = [Contrastive(), Contrastive(directions="i2t"), CosineToOwn(), KLFromClean(), SquaredL2FromClean()]


def value_of(model, objective, batch, images, context) -> torch.Tensor:
    with torch.no_grad():
        return objective.bind(model, batch, context)(model.encode_image(images))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_raises_every_objective_within_the_budget(objective, norm) -> None:
    model, batch = tiny_clip().eval(), random_batch()
    threat = ThreatModel(eps=8 / 255 if norm == "linf" else 1.0, norm=norm)
    context = context_of(model, batch)
    result = PGD(threat=threat, objective=objective, steps=5)(model, batch, context)
    before = value_of(model, objective, batch, batch.images, context)
    after = value_of(model, objective, batch, result.images, context)
    assert (after > before).all()
    assert (result.distance <= threat.eps + 1e-6).all() and (result.distance > threat.eps / 2).all()
    assert result.images.min() >= 0 and result.images.max() <= 1 and result.images.dtype == torch.float32
    assert result.texts == batch.texts and not result.words_changed.any()


def test_steps_pay() -> None:
    model, batch = tiny_clip().eval(), random_batch()
    context = context_of(model, batch)
    values = []
    for steps in (1, 5, 20):
        attack = PGD(threat=ThreatModel(eps=8 / 255), steps=steps, step_size=1 / 255)
        values.append(value_of(model, Contrastive(), batch, attack(model, batch).images, context).mean())
    assert values[0] < values[1] < values[2]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_splitting_a_batch_changes_nothing(objective) -> None:
    model, batch = tiny_clip().eval(), random_batch((2, 1, 3, 2, 1))
    context = context_of(model, batch)
    attack = PGD(threat=ThreatModel(eps=8 / 255), objective=objective, steps=3)
    whole = attack(model, batch, context).images
    parts = [attack(model, batch.rows(a, b), context).images for a, b in ((0, 2), (2, 3), (3, 5))]
    different = ((whole - torch.cat(parts)).abs() > 1e-6).float().mean()
    # Batched convolutions round differently; near its minimum the KL's gradient is mostly rounding.
    assert different <= (0.05 if isinstance(objective, KLFromClean) else 1e-3)


def test_seed_and_index_decide_the_draws() -> None:
    model, batch = tiny_clip().eval(), random_batch()
    threat = ThreatModel(eps=8 / 255)
    first, again, other = (PGD(threat=threat, seed=seed)(model, batch).images for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    draws = SeededDraws(3)
    index = torch.tensor([4, 9, 2])
    for draw in (draws.uniform, draws.normal):
        assert torch.equal(draw("a", index, (2, 2))[1], draw("a", index[1:2], (2, 2))[0])
        assert not torch.equal(draw("a", index, (2, 2)), draw("b", index, (2, 2)))
    uniform, normal = draws.uniform("c", index, (40000,)), draws.normal("c", index, (40000,))
    assert uniform.min() >= -1 and uniform.max() < 1 and uniform.mean().abs() < 0.02
    assert normal.mean().abs() < 0.02 and (normal.std() - 1).abs() < 0.02


def test_an_attack_leaves_no_trace() -> None:
    model, batch = tiny_clip(), random_batch()
    model.train()
    model.image_tower.blocks[0].eval()
    next(model.parameters()).requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    random_state, images = torch.get_rng_state(), batch.images.clone()
    PGD(threat=ThreatModel(eps=8 / 255))(model, batch)
    assert modes == [m.training for m in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state()) and torch.equal(images, batch.images)


class Overspender(Attack):
    """Leaves the ball and the box, and writes a NaN."""

    def run(self, model, batch, context, draws):
        images = batch.images + 0.5
        images[0, 0, 0, 0] = float("nan")
        return images, batch.texts


def test_the_outer_call_projects_what_an_attack_returns() -> None:
    batch = random_batch()
    result = Overspender(threat=ThreatModel(eps=4 / 255))(tiny_clip(), batch)
    assert result.images.isfinite().all() and (result.distance <= 4 / 255 + 1e-6).all()
    assert result.images.max() <= 1


def test_an_overspent_text_budget_is_caught() -> None:
    batch = random_batch()
    texts = ("x y " + batch.texts[0].split(" ", 2)[2], *batch.texts[1:])
    assert within_budget(ThreatModel(max_words=2), batch, batch.images, texts).words_changed[0] == 2
    with pytest.raises(AssertionError, match="text budget 1 overspent"):
        within_budget(ThreatModel(max_words=1), batch, batch.images, texts)


@pytest.mark.parametrize(
    ("source", "adversarial", "count"),
    [
        ("a red dog", "a red dog", 0),
        ("a red dog", "a blue dog", 1),
        ("a red dog", "a very blue dog", 1),
        ("a red dog", "one blue dog", 2),
        ("a red dog", "dog red a", 2),
        ("a dog", "a dog runs", 1),
        ("", "x", 1),
        ("dog dog dog", "dog cat dog", 1),
    ],
)
def test_words_changed(source: str, adversarial: str, count: int) -> None:
    assert words_changed(source, adversarial) == count


def test_unusable_batches_are_refused() -> None:
    attack, model, batch = PGD(threat=ThreatModel()), tiny_clip(), random_batch()
    for images, reason in [
        (batch.images * 255, "divide 8-bit pixels by 255"),
        ((batch.images * 255).to(torch.uint8), "fp32"),
        (batch.images.double(), "fp32"),
        (batch.images[:, :1], r"\[B, 3, H, W\]"),
        (torch.where(batch.images > 0.5, torch.nan, batch.images), "finite"),
    ]:
        with pytest.raises(UserError, match=reason):
            attack(model, batch.replace(images=images))
    with pytest.raises(UserError, match="8 entries"):
        attack(model, replace(batch, texts=batch.texts[:-1]))
    with pytest.raises(UserError, match="nothing to attack: 0 images"):
        attack(model, batch.rows(0, 0))


ATTACKS = {
    "pgd": PGD,
    "mi_fgsm": MIFGSM,
    "sga": partial(SGA, candidates=tiny_candidates()),
    "sep": partial(SepAttack, candidates=tiny_candidates()),
    "tecoa_itr": TeCoAITR,
    "fare": partial(FARE, teacher=tiny_clip()),
    "mat": partial(MAT, text_search=WordSubstitution(candidates=tiny_candidates())),
}


@pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS)
def test_steps_that_make_no_sense_are_refused(make) -> None:
    for settings, reason in [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": -3}, "steps must be at least 1, got -3"),
        ({"step_size": -0.01}, "step_size .* not negative, got -0.01"),
        ({"step_size": float("nan")}, "finite"),
    ]:
        with pytest.raises(UserError, match=reason):
            make(threat=ThreatModel(), **settings)
    make(threat=ThreatModel(eps=0.0), steps=1, step_size=0.0)


def test_default_constants() -> None:
    pgd = [PGD(threat=threat) for threat in (ThreatModel(eps=0.1), ThreatModel(eps=1.0, norm="l2"))]
    assert [(attack.steps, attack.step_size, attack.random_start) for attack in pgd] == [
        (10, 0.1 / 4, True),
        (10, 0.2, True),
    ]
    sga = SGA(threat=ThreatModel(), candidates=tiny_candidates())  # SGA, ICCV 2023, released code
    assert (sga.steps, sga.step_size, sga.noise_std) == (10, pytest.approx(0.5 / 255), 0.05)
    assert sga.scales == (0.5, 0.75, 1.25, 1.5)
    sep = SepAttack(threat=ThreatModel(), candidates=tiny_candidates())  # Co-Attack, ACM MM 2022, released code
    assert (sep.image.steps, sep.image.step_size) == (10, pytest.approx(0.25 / 255))
    for words, representation in ((sga.words, "features"), (sep.words, "embeds")):
        assert (words.beam, words.max_words) == (1, 1)
        assert words.importance == words.judged == representation


def test_an_attack_finds_its_gradients_inside_no_grad() -> None:
    model, batch = tiny_clip(), random_batch()
    attack = PGD(threat=ThreatModel(eps=8 / 255))
    with torch.no_grad():
        images = attack(model, batch).images
    assert torch.equal(images, attack(model, batch).images)


def test_threat_models_that_make_no_sense_are_refused() -> None:
    for settings, reason in [
        ({"eps": 2}, "write 2/255"),
        ({"eps": -0.1}, "negative"),
        ({"eps": float("nan")}, "negative"),
        ({"norm": "l1"}, "'linf' or 'l2'"),
        ({"max_words": -1}, "max_words"),
        ({"bounds": (1.0, 0.0)}, "low < high"),
    ]:
        with pytest.raises(UserError, match=reason):
            ThreatModel(**settings)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball_and_no_more(norm) -> None:
    batch = random_batch((1,) * 40, size=8)
    batch = batch.replace(images=torch.full_like(batch.images, 0.5))
    threat = ThreatModel(eps=0.25, norm=norm)
    delta = (random_start(batch, threat, SeededDraws(0)) - 0.5).flatten(1)
    if norm == "linf":
        assert -0.25 <= delta.min() < -0.24 and 0.24 < delta.max() <= 0.25
    else:
        radius = delta.norm(dim=1)
        assert radius.max() <= 0.25 + 1e-6 and radius.max() > 0.2 and radius.min() < 0.05
    one_sided = random_start(batch, ThreatModel(eps=0.25), SeededDraws(0), one_sided=True) - 0.5
    assert one_sided.min() >= 0 and one_sided.max() > 0.24
