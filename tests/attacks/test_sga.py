"""SGA and Sep-Attack against plain restatements, image by image and caption by caption."""

import pytest
import torch
import torch.nn.functional as F
from batches import random_batch
from oracles.word_substitution import Oracle
from tiny_mlm import tiny_candidates, tiny_captions, tiny_parts
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.sep import SepAttack
from fastmat.attacks.sga import SGA
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.text.words import STOP_WORDS
from fastmat.types import Batch, ThreatModel

THREAT = ThreatModel(eps=32 / 255, max_words=1)  # far enough for the moved image to choose other words
# A middle length below the captions': at the published 30 none of these would be cut.
QUIRKS = [Quirks(), Quirks.official(round_trip=False, text_max_length=30).but(mid_max_length=6)]


def words_batch() -> Batch:
    batch = random_batch((2, 1, 3))
    return batch.replace(texts=tuple(tiny_captions(6, seed=3)))


def oracle(model, quirks: Quirks, *, choice: str, importance: str, threshold: float) -> Oracle:
    bert, tokenizer = tiny_parts()
    return Oracle(
        bert=bert,
        tokenizer=tokenizer,
        model=model,
        stop_words=set(STOP_WORDS),
        quirks=quirks,
        max_words=1,
        choice=choice,
        importance=importance,
        compare=importance,
        top_k=10,
        threshold=threshold,
    )


def plain_sga(model, batch: Batch, quirks: Quirks, *, steps: int, seed: int) -> tuple[Tensor, list[str], list[str]]:
    """One image at a time, one view at a time, with the label loop; the texts of both passes."""
    words = oracle(model, quirks, choice="cosine", importance="features", threshold=0.3)
    images, before, texts = [], [], []
    for i in range(len(batch)):
        x0, index = batch.images[i], batch.index[i : i + 1]
        own = [t for t, of in zip(batch.texts, batch.txt2img.tolist(), strict=True) if of == i]
        clean = model.encode_image(x0[None]).features[0].detach()
        first = [words.attack(t, clean) for t in own]
        length = quirks.mid_max_length
        targets = [model.encode_text(model.tokenize([t], max_length=length)).features[0].detach() for t in first]
        draws = SeededDraws(seed)
        x = (x0 + THREAT.eps * draws.uniform("start", index, x0.shape)[0]).clamp(0, 1)
        for step in range(steps):
            x = x.detach().requires_grad_(True)
            views = [x]
            for k, scale in enumerate((0.5, 0.75, 1.25, 1.5)):
                noise = 0.05 * draws.normal(f"scale/{step}/{k}", index, x0.shape)[0]
                small = [int(32 * scale)] * 2
                down = resize((x + noise)[None], small, InterpolationMode.BICUBIC, antialias=quirks.antialias)
                back = resize(down.clamp(0, 1), [32, 32], InterpolationMode.BICUBIC, antialias=quirks.antialias)
                views.append(back[0])
            value = sum(-(model.encode_image(v[None]).features[0] @ t) for v in views for t in targets)
            (gradient,) = torch.autograd.grad(value, x)
            moved = x.detach() + THREAT.eps / 4 * gradient.sign()
            x = (x0 + (moved - x0).clamp(-THREAT.eps, THREAT.eps)).clamp(0, 1)
        images.append(x.detach())
        moved_features = model.encode_image(x.detach()[None]).features[0].detach()
        before += first
        texts += [words.attack(t, moved_features) for t in own]
    return torch.stack(images), before, texts


@pytest.mark.parametrize("quirks", QUIRKS, ids=["correct", "official"])
def test_sga_equals_the_plain_one(quirks: Quirks) -> None:
    model, batch = tiny_clip(seed=2).eval().requires_grad_(False), words_batch()
    attack = SGA(threat=THREAT, candidates=tiny_candidates(), steps=4, quirks=quirks, seed=5)
    result = attack(model, batch)
    images, first, texts = plain_sga(model, batch, quirks, steps=4, seed=5)
    assert list(result.texts) == texts
    assert texts != first != list(batch.texts)
    # One gradient near zero may round to the other sign, and moves its neighbours in the steps after.
    assert ((result.images - images).abs() > 1e-5).float().mean() <= 0.01
    assert result.words_changed.max() == 1


@pytest.mark.parametrize("quirks", QUIRKS, ids=["correct", "official"])
def test_sep_equals_the_plain_one(quirks: Quirks) -> None:
    model, batch = tiny_clip(seed=2).eval().requires_grad_(False), words_batch()
    model.image_projection.weight.data.mul_(20)  # a KL far above rounding
    result = SepAttack(threat=THREAT, candidates=tiny_candidates(), steps=4, quirks=quirks, seed=5)(model, batch)
    words = oracle(model, quirks, choice="kl", importance="embeds", threshold=0.3)
    assert list(result.texts) == [words.attack(t, None) for t in batch.texts]
    draw = SeededDraws(5).uniform("start", batch.index, batch.images.shape[1:])
    x = batch.images + THREAT.eps * ((draw + 1) / 2 if quirks.one_sided_start else draw)
    x = x if quirks.one_sided_start else x.clamp(0, 1)
    clean = model.encode_image(batch.images).embeds.softmax(1)
    for _ in range(4):
        x = x.detach().requires_grad_(True)
        value = F.kl_div(model.encode_image(x).embeds.log_softmax(1), clean, reduction="sum")
        (gradient,) = torch.autograd.grad(value, x)
        moved = x.detach() + 1.25 * THREAT.eps / 4 * gradient.sign()
        x = (batch.images + (moved - batch.images).clamp(-THREAT.eps, THREAT.eps)).clamp(0, 1)
    assert ((result.images - x).abs() > 1e-5).float().mean() <= 0.005


def test_without_a_word_budget_only_the_image_moves() -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch()
    for attack in (SGA, SepAttack):
        result = attack(threat=ThreatModel(eps=4 / 255, max_words=0), candidates=tiny_candidates(), steps=2)(
            model, batch
        )
        assert result.texts == batch.texts and (result.distance > 0).all()


def test_a_scale_set_makes_the_attack_hold_under_rescaling() -> None:
    """What the scales are for: the objective seen through a resize of the finished image."""
    model, batch = tiny_clip(seed=2).eval(), words_batch()
    through = {}
    for scales in ((), (0.5, 0.75, 1.25, 1.5)):
        attack = SGA(
            threat=ThreatModel(eps=16 / 255, max_words=0), candidates=tiny_candidates(), scales=scales, steps=10
        )
        images = attack(model, batch).images
        small = F.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            state = model.encode_image(F.interpolate(small, size=32, mode="bicubic", antialias=True))
        own = attack.words.features(model, batch.texts)
        through[len(scales)] = float((state.features[batch.txt2img] * own).sum())
    assert through[4] < through[0]
