"""The margin against its definition, one image and one caption at a time."""

from dataclasses import replace

import pytest
import torch
from batches import random_batch

from fastmat.attacks.base import context_of
from fastmat.attacks.margin import Margin
from fastmat.attacks.pgd import PGD
from fastmat.errors import UserError
from fastmat.models.protocol import ImageState
from fastmat.models.tiny import tiny_clip
from fastmat.types import AttackContext, ThreatModel


def by_hand(features: torch.Tensor, group: torch.Tensor, context: AttackContext) -> list[float]:
    margins = []
    for image, own in zip(features, group, strict=True):
        cosines = [
            (float(image @ text), int(g)) for text, g in zip(context.text_features, context.text_group, strict=True)
        ]
        wrong = max(c for c, g in cosines if g != int(own))
        margins.append(wrong - max(c for c, g in cosines if g == int(own)))
    return margins


def state_of(features: torch.Tensor) -> ImageState:
    return ImageState(tokens=None, embeds=features, features=features)


def shuffled_context(batch, model) -> AttackContext:
    """The batch's captions among others, in no order, two images of one group."""
    context = context_of(model, batch)
    other = context_of(model, random_batch((3,) * 7, seed=5))
    order = torch.randperm(len(context.text_group) + 21, generator=torch.Generator().manual_seed(1))
    return replace(
        context,
        text_features=torch.cat([context.text_features, other.text_features])[order],
        text_group=torch.cat([context.text_group, other.text_group + 50])[order],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_margin_of_any_groups(dtype) -> None:
    model, batch = tiny_clip().eval(), random_batch((2, 1, 3, 2))
    batch = replace(batch, group=torch.tensor([7, 900, 7, 3]))
    context = shuffled_context(batch, model)
    context = replace(context, text_features=context.text_features.to(dtype))
    features = model.encode_image(torch.rand_like(batch.images)).features.detach().to(dtype)
    got = Margin().bind(model, batch, context)(state_of(features))
    exact = replace(context, text_features=context.text_features.double())
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(by_hand(features.double(), batch.group, exact), abs=1e-6)


def test_positive_exactly_when_rank_one_is_lost() -> None:
    model, batch = tiny_clip().eval(), random_batch((1,) * 40)
    context = context_of(model, batch)
    noise = torch.randn(context.text_features.shape, generator=torch.Generator().manual_seed(0))
    features = torch.nn.functional.normalize(context.text_features + 0.3 * noise, dim=1)
    margin = Margin().bind(model, batch, context)(state_of(features))
    lost = (features @ context.text_features.T).argmax(1) != torch.arange(40)
    assert torch.equal(margin > 0, lost) and lost.any() and not lost.all()


def test_gradient_is_that_of_the_definition_and_finite() -> None:
    model, batch = tiny_clip().eval(), random_batch((2, 1, 3, 2))
    context = shuffled_context(batch, model)
    features = model.encode_image(torch.rand_like(batch.images)).features.detach().requires_grad_()
    bound = Margin().bind(model, batch, context)
    (got,) = torch.autograd.grad(bound(state_of(features)).sum(), features)
    similarity = (features @ context.text_features.T).detach()
    own = batch.group[:, None] == context.text_group
    best = [similarity.masked_fill(mask, float("-inf")).argmax(1) for mask in (own, ~own)]
    torch.testing.assert_close(got, context.text_features[best[0]] - context.text_features[best[1]])


def test_values_depend_on_their_own_image_only() -> None:
    model, batch = tiny_clip().eval(), random_batch((2, 1, 3, 2))
    context = shuffled_context(batch, model)
    features = model.encode_image(batch.images).features.detach()
    whole = Margin().bind(model, batch, context)(state_of(features))
    parts = [Margin().bind(model, batch.rows(i, i + 1), context)(state_of(features[i : i + 1])) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_pgd_raises_it() -> None:
    model, batch = tiny_clip().eval(), random_batch()
    context = context_of(model, batch)
    result = PGD(threat=ThreatModel(eps=8 / 255), objective=Margin(), steps=10)(model, batch, context)
    bound = Margin().bind(model, batch, context)
    with torch.no_grad():
        assert (bound(model.encode_image(result.images)) > bound(model.encode_image(batch.images))).all()


def test_a_context_without_a_margin_is_refused() -> None:
    model, batch = tiny_clip().eval(), random_batch((2, 3))
    with pytest.raises(UserError, match=r"context must hold a right and a wrong caption .* 2 texts .* are 2 to 2"):
        PGD(threat=ThreatModel(), objective=Margin())(model, batch.rows(0, 1))
    context = context_of(model, batch.rows(0, 1))
    with pytest.raises(UserError, match="are 0 to 0"):
        Margin().bind(model, batch.rows(1, 2), context)
