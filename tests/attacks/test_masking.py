"""Each warning on a model built to deserve it, and none on one that does not."""

import pytest
import torch
from batches import random_batch
from torch import Tensor, nn

from fastmat.attacks.apgd import APGD
from fastmat.attacks.base import context_of, frozen
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.masking import black_box_warning, gradient_warnings
from fastmat.attacks.rivals import Rivals
from fastmat.attacks.square import Square
from fastmat.models.tiny import tiny_clip
from fastmat.types import ThreatModel

THREAT = ThreatModel(eps=8 / 255)


class Reversed(torch.autograd.Function):
    """The identity, whose gradient points the wrong way."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return -grad


def before(images):
    """tiny_clip, with `images` applied to what it sees."""
    model = tiny_clip().eval()
    encode = model.encode_image
    model.encode_image = lambda x: encode(images(x))  # type: ignore[method-assign]
    return model


def functional_dropout(x: Tensor) -> Tensor:
    return nn.functional.dropout(x, 0.1, training=True)  # eval mode does not reach it


def first_only(x: Tensor) -> Tensor:
    """No gradient for any image but the first."""
    return torch.cat([x[:1], x[1:].detach()])


MODELS = {
    "plain": (before(lambda x: x), set()),
    "noise": (before(lambda x: x + 0.01 * torch.randn_like(x)), {"random"}),
    "dropout": (before(functional_dropout), {"random"}),
    "quantised": (before(lambda x: (x * 31).round() / 31), {"zero"}),
    "detached": (before(Tensor.detach), {"zero"}),
    "detached in part": (before(first_only), {"zero"}),
    "reversed": (before(Reversed.apply), {"masked"}),
    "infinite": (before(lambda x: x + 0 * (x - x).sqrt()), {"zero"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_deserves_a_warning(name: str) -> None:
    model, kinds = MODELS[name]
    batch = random_batch((1,) * 8)
    with frozen(model):
        context = context_of(model, batch)
        said = gradient_warnings(model, batch, context, threat=THREAT, draws=SeededDraws(0))
    assert set(said) == kinds


def test_a_random_text_tower_is_noticed() -> None:
    model = tiny_clip().eval()
    encode = model.encode_text

    def noisy(tokens):
        state = encode(tokens)
        return state._replace(features=state.features + 0.01 * torch.randn_like(state.features))

    model.encode_text = noisy  # type: ignore[method-assign]
    batch = random_batch()
    said = gradient_warnings(model, batch, context_of(model, batch), threat=THREAT, draws=SeededDraws(0))
    assert set(said) == {"random"}


def test_dropout_layers_are_no_reason_to_warn() -> None:
    """An attack runs in eval mode."""
    model = tiny_clip().train()
    model.image_projection = nn.Sequential(nn.Dropout(0.5), model.image_projection)
    batch = random_batch((1,) * 8)
    with frozen(model):
        said = gradient_warnings(model, batch, context_of(model, batch), threat=THREAT, draws=SeededDraws(0))
    assert not said


def test_how_many_images_have_no_gradient_is_said() -> None:
    batch = random_batch((1,) * 8)
    model = MODELS["detached in part"][0]
    said = gradient_warnings(model, batch, context_of(model, batch), threat=THREAT, draws=SeededDraws(0))
    assert "for 7 of 8 images" in said["zero"]


def test_no_radius_has_no_gradient_to_speak_of() -> None:
    batch = random_batch()
    model = MODELS["detached"][0]
    assert not gradient_warnings(
        model, batch, context_of(model, batch), threat=ThreatModel(eps=0.0), draws=SeededDraws(0)
    )


@pytest.mark.parametrize(("name", "kinds"), [("plain", set()), ("quantised", {"masked"})])
def test_square_ahead_of_apgd(name: str, kinds: set[str]) -> None:
    model, batch = MODELS[name][0], random_batch((1,) * 8)
    context, objective = context_of(model, batch), Rivals(form="contrastive")
    value = objective.bind(model, batch, context)
    made = [
        attack(model, batch, context).images
        for attack in (
            APGD(threat=THREAT, objective=objective, steps=20),
            Square(threat=THREAT, objective=objective, n_queries=60),
        )
    ]
    with torch.no_grad():
        white, black = (value(model.encode_image(images)) for images in made)
    assert set(black_box_warning(white, black)) == kinds
