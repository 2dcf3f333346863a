"""Fusion models trained and hardened: every defence's views, exact resume, parts of a step, refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from training.synthetic import THREAT, SwapWord, Synthetic, make_batch, settings

from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.fusion import KLFusedFromClean
from fastmat.defences.fare import FARE
from fastmat.defences.finetune import FineTune
from fastmat.defences.mat import MAT
from fastmat.defences.matching import Matching, MatchingSettings
from fastmat.defences.tecoa_itr import TeCoAITR
from fastmat.errors import UserError
from fastmat.models.protocol import TextState
from fastmat.models.tiny import tiny_clip
from fastmat.models.tiny_fusion import tiny_albef, tiny_blip
from fastmat.training.forward import encode_views
from fastmat.training.loop import train
from fastmat.training.outer import Outer
from fastmat.training.parameters import bounded_scale, clamp_logit_scale, trained_parameters

MODELS = {"albef": tiny_albef, "blip": tiny_blip}
DEFENCES = {
    "finetune": lambda: FineTune(),
    "tecoa_itr": lambda: TeCoAITR(threat=THREAT, steps=1, objective=KLFusedFromClean()),
    "mat": lambda: MAT(threat=THREAT, text_search=SwapWord(), steps=1, pairs={"adv-adv": 1.0, "clean-clean": 0.5}),
}


def matching(model, defence: str = "finetune", **changed: object) -> Matching:
    told = {"queue": 12, **changed}
    return Matching(defence=DEFENCES[defence](), model=model, settings=MatchingSettings(**told))


def outer(model, **changed: object) -> Outer:
    return Outer(model, settings(**changed), device=torch.device("cpu"))


@pytest.mark.parametrize("model_name", MODELS)
def test_losses_against_plain_formulas(model_name: str) -> None:
    """Every pair of MAT with its weight: ITC over [batch | queue] with soft targets, ITM over drawn negatives."""
    model, batch = MODELS[model_name]().eval(), make_batch()
    defence = matching(model, "mat", itc=0.3, itm=0.7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    views = defence.perturb(model, batch, SeededDraws(0))
    features = encode_views(outer(model), model, views, batch)
    terms = defence.loss(features)
    assert set(terms) == {
        f"{name}/{pair}" for name in ("contrastive", "matching") for pair in ("adv-adv", "clean-clean")
    }
    memory, group, text_group = defence.memory, batch.group, batch.text_group
    with torch.no_grad():
        image_m = memory.model.encode_image(batch.images).features
        text_m = memory.model.encode_text(memory.model.tokenize(batch.texts)).features
    for pair, weight in (("adv-adv", 1.0), ("clean-clean", 0.5)):
        image_view, text_view = pair.split("-")
        image, text = features.images[image_view], features.texts[text_view]
        itc = torch.zeros(())
        for rows, soft, keys, own, other, queue in (
            (image.features, image_m, text_m, group, text_group, memory.texts),
            (text.features, text_m, image_m, text_group, group, memory.images),
        ):
            columns = torch.cat([keys, queue.features])
            positive = (own[:, None] == torch.cat([other, queue.group])).float()
            target = 0.4 * (soft @ columns.T / model.temp).softmax(1) + 0.6 * positive / positive.sum(1, keepdim=True)
            itc = itc - (target * (rows @ columns.T / model.temp).log_softmax(1)).sum(1).mean() / 2
        torch.testing.assert_close(terms[f"contrastive/{pair}"], 0.3 * weight * itc, atol=1e-5, rtol=1e-5)

        chosen = views.match(features)[pair]
        t = len(batch.texts)
        assert torch.equal(chosen.image_rows[:t], batch.txt2img) and torch.equal(chosen.text_rows[:t], torch.arange(t))
        assert bool((group[chosen.image_rows[t : 2 * t]] != text_group).all())
        assert bool((text_group[chosen.text_rows[2 * t :]] != text_group).all())
        rows = TextState(*(of[chosen.text_rows] for of in text))
        logits = model.fuse(image._replace(tokens=image.tokens[chosen.image_rows]), rows).itm_logits
        itm = F.cross_entropy(logits, torch.tensor([1] * t + [0] * 2 * t))
        torch.testing.assert_close(terms[f"matching/{pair}"], 0.7 * weight * itm, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_name", MODELS)
def test_parts_of_a_step_give_the_same_gradients(model_name: str) -> None:
    batch, gradients = make_batch(), []
    for changed in ({}, {"micro_batch": 1}):
        model = MODELS[model_name]().eval()
        defence = matching(model)
        views = defence.perturb(model, batch, SeededDraws(0))
        features = encode_views(outer(model, **changed), model, views, batch)
        sum(defence.loss(features).values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    whole, parts = gradients
    assert whole.keys() == parts.keys() and "itm_head.weight" in whole
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_name", MODELS)
def test_what_trains(model_name: str) -> None:
    """A zero itc still reaches all that trains; without matching its part stays out."""
    model, batch = MODELS[model_name]().train(), make_batch()
    for itc, itm in ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
        model.zero_grad()
        defence = matching(model, itc=itc, itm=itm)
        chosen = {id(p) for p in trained_parameters(model, defence.trains)}
        views = defence.perturb(model, batch, SeededDraws(0))
        sum(defence.loss(encode_views(outer(model), model, views, batch)).values()).backward()
        assert chosen == {id(p) for p in model.parameters() if p.grad is not None}
        assert (id(model.itm_head.weight) in chosen) == (itm > 0)


def run(out: Path, steps: int, *, resume: bool = False, model: str = "albef", **changed: object):
    trained = MODELS[model]()
    told = settings(steps=steps, lr=1e-3, save_every=2, **changed)
    defence = matching(trained, "tecoa_itr", ramp_steps=3)
    report = train(trained, defence, Synthetic(), settings=told, out=out, resume=resume, config={})
    return report, defence


@pytest.mark.parametrize("model_name", MODELS)
def test_resume_is_exact(model_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after two steps and gone on with, in weights, momentum encoders, queues and counters."""
    _, whole = run(tmp_path / "whole", 4, model=model_name)
    assert whole.memory.steps == 4 and whole.memory.images.start == 4  # 16 images into 12 places
    saved = Matching.remember
    calls = []

    def stops(self: Matching) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        saved(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Matching, "remember", stops)
        run(tmp_path / "halves", 4, model=model_name)
    report, other = run(tmp_path / "halves", 4, resume=True, model=model_name)
    assert report.resumed_from == 2
    for name in ("weights", "optimizer", "memory"):
        mine, its = (
            load_file(tmp_path / folder / f"checkpoints/step-00000004/{name}.safetensors")
            for folder in ("whole", "halves")
        )
        assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)
    assert other.memory.texts.start == whole.memory.texts.start


def test_learns_to_match(tmp_path: Path) -> None:
    """The same batch again and again: both terms fall."""

    class Same(Synthetic):
        def iterate(self, start: int, stop: int, *, rank: int = 0, world: int = 1):
            return iter([make_batch()] * (stop - start))

    model = tiny_albef()
    batch = make_batch()
    defence = matching(model, queue=0, soft_weight=0.0, ema_decay=0.5)
    views = defence.perturb(model, batch, SeededDraws(0))
    first = {k: float(v.detach()) for k, v in defence.loss(encode_views(outer(model), model, views, batch)).items()}
    told = settings(steps=40, lr=3e-3, save_every=40)
    report = train(model, defence, Same(), settings=told, out=tmp_path / "run", config={})
    assert all(report.terms[name] < 0.95 * value for name, value in first.items()), (first, report.terms)


def test_the_temperature_of_blip_stays_in_its_bounds() -> None:
    for make, want in ((tiny_blip, 0.5), (tiny_albef, 0.9)):
        model = make()
        with torch.no_grad():
            model.temp.fill_(0.9)
        clamp_logit_scale(model)
        assert model.temp.item() == pytest.approx(want)
    assert bounded_scale(tiny_blip(), []) is None


def test_keys_of_the_attack() -> None:
    model, batch = tiny_albef().eval(), make_batch()
    for keys in ("clean", "adv"):
        defence = matching(model, "tecoa_itr", keys=keys)
        views = defence.perturb(model, batch, SeededDraws(0))
        images = batch.images if keys == "clean" else views.images["adv"]
        defence.remember()
        with torch.no_grad():
            want = defence.memory.model.encode_image(images).features
        torch.testing.assert_close(defence.memory.images.features[:4], want)


def test_refusals() -> None:
    model = tiny_albef()
    with pytest.raises(UserError, match="FARE contrasts no images with texts"):
        Matching(defence=FARE(threat=THREAT, teacher=model), model=model)
    with pytest.raises(UserError, match="does not fuse images with texts"):
        Matching(defence=FineTune(), model=tiny_clip())
    with pytest.raises(UserError, match="multiple of the global batch of 4 images, got 10"):
        matching(model, queue=10).perturb(model, make_batch(), SeededDraws(0))
    alone = replace(make_batch(), group=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match="belongs to one image"):
        encode_views(outer(model), model, matching(model).perturb(model, alone, SeededDraws(0)), alone)
    for changed, said in (
        ({"itc": 0.0, "itm": 0.0}, "one must be positive"),
        ({"soft_weight": 2.0}, "soft_weight must be in"),
        ({"keys": "dirty"}, "keys must be one of clean, adv"),
        ({"ema_decay": -1.0}, "ema_decay must be in"),
        ({"queue": -1}, "queue must not be negative"),
    ):
        with pytest.raises(UserError, match=said):
            MatchingSettings(**changed)
