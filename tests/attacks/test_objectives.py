"""Objectives against formulas written out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from batches import random_batch

from fastmat.attacks.base import context_of, text_features
from fastmat.attacks.objectives import Contrastive, CosineToOwn, KLFromClean, SquaredL2FromClean
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.types import AttackContext


def cross_entropy(scores: list[float], target: int) -> float:
    return math.log(sum(math.exp(s) for s in scores)) - scores[target]


@pytest.mark.parametrize("directions", ["i2t", "t2i", "both"])
def test_contrastive_with_two_images_of_one_group(directions) -> None:
    model, batch = tiny_clip().eval(), random_batch((2, 1, 2))
    group = torch.tensor([7, 8, 7])
    batch = type(batch)(images=batch.images, texts=batch.texts, txt2img=batch.txt2img, index=batch.index, group=group)
    context = context_of(model, batch)
    moved = model.encode_image(torch.rand_like(batch.images))
    got = Contrastive(directions=directions).bind(model, batch, context)(moved).detach()
    scale, texts, frozen = float(model.logit_scale.detach()), context.text_features, context.image_features
    for i in range(3):
        own = [t for t in range(5) if context.text_group[t] == group[i]]
        row = [scale * float(moved.features[i].detach() @ t) for t in texts]
        i2t = sum(cross_entropy(row, t) for t in own) / len(own)
        t2i = 0.0
        for t in own:
            others = [scale * float(frozen[j] @ texts[t]) for j in range(3) if group[j] != group[i]]
            t2i += cross_entropy([row[t], *others], 0) / len(own)
        want = {"i2t": i2t, "t2i": t2i, "both": (i2t + t2i) / 2}[directions]
        assert float(got[i]) == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_context_supplies_the_negatives() -> None:
    model, batch = tiny_clip().eval(), random_batch()
    small, large = context_of(model, batch), context_of(model, random_batch((3,) * 9, seed=5))
    joint = AttackContext(
        **{
            name: torch.cat([getattr(small, name), getattr(large, name)])
            for name in ("image_features", "text_features", "text_group")
        },
        image_group=torch.cat([small.image_group, large.image_group + 50]),
    )
    state = model.encode_image(batch.images)
    assert (Contrastive().bind(model, batch, joint)(state) > Contrastive().bind(model, batch, small)(state)).all()


def test_cosine_to_own_is_minus_the_sum_over_captions() -> None:
    model, batch = tiny_clip().eval(), random_batch()
    state, texts = model.encode_image(batch.images), text_features(model, batch.texts)
    got = CosineToOwn().bind(model, batch, context_of(model, batch))(state).detach()
    for i in range(len(batch)):
        want = -sum(float(state.features[i].detach() @ texts[t]) for t in range(len(texts)) if batch.txt2img[t] == i)
        assert float(got[i]) == pytest.approx(want, abs=1e-5)


def test_unimodal_distances() -> None:
    model, batch = tiny_clip().eval(), random_batch()
    context = context_of(model, batch)
    clean = model.encode_image(batch.images).embeds.double()
    state = model.encode_image(torch.rand_like(batch.images))
    kl = KLFromClean().bind(model, batch, context)(state)
    squared = SquaredL2FromClean().bind(model, batch, context)(state)
    p, q = clean.softmax(-1), state.embeds.double().softmax(-1)
    torch.testing.assert_close(kl.double(), (p * (p.log() - q.log())).sum(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(squared.double(), ((clean - state.embeds) ** 2).sum(-1), atol=1e-5, rtol=1e-4)
    at_rest = model.encode_image(batch.images)
    assert float(KLFromClean().bind(model, batch, context)(at_rest).detach().abs().max()) < 1e-6


@pytest.mark.parametrize("directions", ["both", "i2t"])
def test_an_image_without_a_text_in_the_context_is_refused(directions) -> None:
    model, batch = tiny_clip().eval(), random_batch()
    context = replace(context_of(model, batch), text_group=batch.text_group.clamp_min(int(batch.group[1])))
    with pytest.raises(UserError, match="image 0 of the batch has no positive"):
        Contrastive(directions=directions).bind(model, batch, context)
