"""Rivals and standings against their definitions, one pair at a time in float64."""

from dataclasses import replace

import pytest
import torch
from batches import random_batch

from fastmat.attacks.base import context_of, text_features
from fastmat.attacks.rivals import Rivals, Standing, nearest_wrong, standing
from fastmat.errors import UserError
from fastmat.models.protocol import ImageState
from fastmat.models.tiny import tiny_clip
from fastmat.types import AttackContext, Batch

MODEL = tiny_clip().eval().requires_grad_(False)


def setting() -> tuple[Batch, AttackContext]:
    """Captions that moved, in a shuffled gallery with other images, two images of one group."""
    batch = replace(random_batch((2, 1, 3, 2)), group=torch.tensor([7, 900, 7, 3]))
    one, other = context_of(MODEL, batch), context_of(MODEL, random_batch((3,) * 7, seed=5))
    order = torch.randperm(29, generator=torch.Generator().manual_seed(1))
    context = AttackContext(
        image_features=torch.cat([other.image_features, one.image_features]),
        image_group=torch.cat([other.image_group, one.image_group]),
        text_features=torch.cat([one.text_features, other.text_features])[order],
        text_group=torch.cat([one.text_group, other.text_group])[order],
    )
    return batch.replace(texts=tuple(f"big {text}" for text in batch.texts)), context


def cosines(
    image: torch.Tensor, captions: torch.Tensor, i: int, batch: Batch, context: AttackContext
) -> tuple[list[float], list[float], list[list[float]]]:
    """Of image i: to its own captions, to wrong captions, and of each own caption to wrong images."""
    own = [captions[t].double() for t, owner in enumerate(batch.txt2img.tolist()) if owner == i]
    texts = zip(context.text_features.double(), context.text_group.tolist(), strict=True)
    images = list(zip(context.image_features.double(), context.image_group.tolist(), strict=True))
    group, image = int(batch.group[i]), image.double()
    wrong = [float(image @ text) for text, other in texts if other != group]
    columns = [[float(text @ rival) for rival, other in images if other != group] for text in own]
    return [float(image @ text) for text in own], wrong, columns


def softly(values: list[float], scale: float) -> float:
    return float((scale * torch.tensor(values, dtype=torch.float64)).logsumexp(0))


@pytest.mark.parametrize("directions", ["i2t", "t2i", "both"])
@pytest.mark.parametrize("form", ["margin", "contrastive"])
def test_values_are_those_of_the_definition(form, directions) -> None:
    batch, context = setting()
    features = MODEL.encode_image(torch.rand_like(batch.images)).features.detach()
    captions, scale = text_features(MODEL, batch.texts), float(MODEL.logit_scale)
    expected = []
    for i in range(len(batch)):
        own, wrong, columns = cosines(features[i], captions, i, batch, context)
        if form == "margin":
            i2t = max(wrong) - max(own)
            t2i = sum(min(max(rivals) - mine, 0.05) for mine, rivals in zip(own, columns, strict=True)) / len(own)
        else:
            i2t = softly(wrong + own, scale) - scale * sum(own) / len(own)
            rows = zip(own, columns, strict=True)
            t2i = sum(softly([*rivals, mine], scale) - scale * mine for mine, rivals in rows) / len(own)
        expected.append({"i2t": i2t, "t2i": t2i, "both": (i2t + t2i) / 2}[directions])
    bound = Rivals(form=form, directions=directions, enough=0.05).bind(MODEL, batch, context)
    assert bound(ImageState(None, features, features)).tolist() == pytest.approx(expected, abs=2e-5)


def test_a_caption_lost_for_certain_leaves_the_gradient_to_the_others() -> None:
    batch, context = setting()
    features = text_features(MODEL, batch.texts)[
        [0, 2, 3, 6]
    ].requires_grad_()  # each image stands on its first caption
    captions = text_features(MODEL, batch.texts)
    worst = nearest_wrong(captions, batch, context)[0]
    own = (features[batch.txt2img] * captions).sum(1)
    alive = worst - own < 0.01
    assert alive.any() and not alive.all()
    bound = Rivals(directions="t2i", enough=0.01).bind(MODEL, batch, context)
    (got,) = torch.autograd.grad(bound(ImageState(None, features, features)).sum(), features)
    for i in range(len(batch)):
        mine = batch.txt2img == i
        torch.testing.assert_close(got[i], -captions[mine & alive].sum(0) / mine.sum())


def test_values_depend_on_their_own_image_only() -> None:
    batch, context = setting()
    features = MODEL.encode_image(batch.images).features.detach()
    for form in ("margin", "contrastive"):
        objective = Rivals(form=form)
        whole = objective.bind(MODEL, batch, context)(ImageState(None, features, features))
        parts = []
        for i in range(len(batch)):
            row = features[i : i + 1]
            parts.append(objective.bind(MODEL, batch.rows(i, i + 1), context)(ImageState(None, row, row)))
        torch.testing.assert_close(whole, torch.cat(parts))


def test_standing_counts_lost_queries() -> None:
    batch, context = setting()
    captions = text_features(MODEL, batch.texts)
    noise = torch.randn(captions[[0, 2, 3, 6]].shape, generator=torch.Generator().manual_seed(3))
    features = torch.nn.functional.normalize(captions[[0, 2, 3, 6]] + 0.1 * noise, dim=1)
    got = standing(features, captions, batch, context)
    seen = set()
    for i in range(len(batch)):
        own, wrong, columns = cosines(features[i], captions, i, batch, context)
        tr = max(wrong) - max(own)
        ir = [max(rivals) - mine for mine, rivals in zip(own, columns, strict=True)]
        lost = (tr >= 0) + sum(value >= 0 for value in ir) / len(ir)
        seen.add(lost)
        assert float(got.lost[i]) == pytest.approx(lost)
        assert float(got.margin[i]) == pytest.approx((tr + sum(ir) / len(ir)) / 2, abs=1e-6)
    assert len(seen) > 1


def test_more_lost_queries_beat_any_margin() -> None:
    one = Standing(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.1, 0.1, 0.1]))
    two = Standing(torch.tensor([1.2, 1.0, 1.0]), torch.tensor([-0.5, 0.2, 0.1]))
    assert two.beats(one).tolist() == [True, True, False]
    assert one.beats(two).tolist() == [False, False, False]


def test_what_has_no_rival_is_refused() -> None:
    batch, context = setting()
    alone = context_of(MODEL, batch.rows(1, 2))
    with pytest.raises(UserError, match="no wrong caption"):
        Rivals(directions="i2t").bind(MODEL, batch.rows(1, 2), alone)
    with pytest.raises(UserError, match="no wrong image"):
        Rivals(directions="t2i").bind(MODEL, batch.rows(1, 2), alone)
    with pytest.raises(UserError, match="image 1 of the batch has no caption"):
        Rivals().bind(MODEL, replace(batch, txt2img=torch.tensor([0, 0, 2, 2, 2, 2, 3, 3])), context)
    with pytest.raises(UserError, match="form must be"):
        Rivals(form="soft")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="enough"):
        Rivals(enough=-1)
