"""A corrected model is a model: attacks run through the correction, in every place, and the original stays."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmat.alignment.corrected import Texts, check_sites, check_widths, corrected, remembering
from fastmat.alignment.dynamic import Gate
from fastmat.alignment.oracle import Oracle
from fastmat.alignment.static import Affine
from fastmat.attacks.pgd import PGD
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel, fuses
from fastmat.models.tiny import tiny_clip
from fastmat.models.tiny_fusion import tiny_albef
from fastmat.types import Batch, ThreatModel

TEXTS = ("a red dog", "a blue cat", "two digits")


def affine(width: int, seed: int = 0) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    return Affine(scale=torch.rand(width, generator=generator) + 0.5, shift=torch.randn(width, generator=generator))


def batch(size: int = 32) -> Batch:
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    return Batch(images=images, texts=TEXTS, txt2img=torch.arange(3), index=torch.arange(3), group=torch.arange(3))


def test_behind_both_projections() -> None:
    model, image, text = tiny_clip(), affine(16), affine(16, 1)
    made = corrected(model, {"image": image, "text": text})
    images, tokens = batch().images, model.tokenize(TEXTS)
    before, after = model(images, tokens), made(images, tokens)
    assert torch.allclose(after.image.embeds, image(before.image.embeds), atol=1e-5)
    assert torch.allclose(after.image.features, F.normalize(image(before.image.embeds), dim=-1), atol=1e-5)
    assert torch.allclose(after.text.embeds, text(before.text.embeds), atol=1e-5)
    assert type(made.image_projection) is nn.Linear, "as many operations as without a correction"
    assert isinstance(model.image_projection, nn.Linear) and torch.equal(
        model(images, tokens).image.embeds, before.image.embeds
    )


def test_an_attack_goes_through_the_correction() -> None:
    """Gradients are those of the composed model, and the attack does better against it than one made without it."""
    model, gate = tiny_clip(), Gate(width=16, reduction=2, unit=0.5)
    for parameter in gate.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    made = corrected(model, {"image": gate})
    x = batch().images.requires_grad_()
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    through = torch.autograd.grad((made.encode_image(x).embeds * weight).sum(), x)[0]
    by_hand = torch.autograd.grad((gate(model.encode_image(x).embeds) * weight).sum(), x)[0]
    assert torch.allclose(through, by_hand, atol=1e-6) and bool(through.any())
    attack = PGD(threat=ThreatModel(eps=16 / 255), steps=10)
    adaptive, other = (attack(who, batch()).images for who in (made, model))

    @torch.no_grad()
    def matched(images: torch.Tensor) -> float:
        return float((made.encode_image(images).features * made.encode_text(made.tokenize(TEXTS)).features).sum())

    assert matched(adaptive) < matched(other)


def test_tokens_that_enter_the_fusion() -> None:
    model: VisionLanguageModel = tiny_albef()
    assert fuses(model)
    model.eval()  # type: ignore[attr-defined]
    width = model.image_projection.in_features
    tokens, projection = affine(width), affine(model.image_projection.out_features, 1)
    made = corrected(model, {"tokens": tokens, "image": projection})
    assert fuses(made)
    images, ids = batch(model.image_transform.size).images, model.tokenize(TEXTS)
    state, plain = made.encode_image(images), model.encode_image(images)
    assert torch.allclose(state.tokens, tokens(plain.tokens))
    assert torch.allclose(state.embeds, projection(plain.embeds), atol=1e-5), (
        "tokens are corrected behind the projection's input"
    )
    text = made.encode_text(ids)
    expected = model.fuse(plain._replace(tokens=tokens(plain.tokens)), model.encode_text(ids)).itm_logits
    assert torch.allclose(made.fuse(state, text).itm_logits, expected, atol=1e-6)
    assert float((model.fuse(plain, text).itm_logits - expected).detach().abs().max()) > 1e-5
    encoded = made(images, ids)
    assert torch.allclose(encoded.image.tokens, state.tokens) and torch.equal(encoded.logit_scale, model.logit_scale)
    again = copy.deepcopy(made)
    assert torch.equal(again.encode_image(images).tokens, state.tokens)
    with pytest.raises(AttributeError, match="no_such_thing"):
        made.no_such_thing  # noqa: B018


def test_captions_are_encoded_once() -> None:
    model, texts, seen = tiny_clip(), Texts(), []
    model.text_projection.register_forward_hook(lambda *_: seen.append(1))
    first, second = (remembering(corrected(model, {"image": affine(16, seed)}), texts) for seed in (0, 1))
    tokens = model.tokenize(TEXTS)
    with torch.no_grad():
        states = [made.encode_text(tokens) for made in (model, first, second, first)]
        other = first.encode_text(model.tokenize(TEXTS[::-1]))
    assert len(seen) == 3 and all(torch.allclose(state.features, states[0].features, atol=1e-6) for state in states)
    assert torch.allclose(other.features, states[0].features.flip(0), atol=1e-6)
    assert first.encode_text(tokens).features.requires_grad, "with gradients it encodes"


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"sites: DualEncoder fuses no image tokens"):
        check_sites(tiny_clip(), ("tokens",))
    with pytest.raises(
        UserError, match=r"gate\.safetensors corrects 8 channels, but the model's image projection gives 16"
    ):
        check_widths({"image": Gate(width=8)}, {"image": 16}, source="gate.safetensors")


def test_an_oracle_is_told() -> None:
    clean, adversarial = torch.randn(4, 6), torch.randn(4, 6)
    oracle = Oracle(width=6)
    assert torch.equal(oracle(adversarial), adversarial)
    oracle.clean = clean
    assert torch.allclose(oracle(adversarial), clean, atol=1e-6)
    basis = torch.linalg.qr(torch.randn(6, 2)).Q
    some = Oracle(width=6, basis=basis)
    some.clean = clean
    left = some(adversarial) - clean
    assert torch.allclose(left @ basis, torch.zeros(4, 2), atol=1e-5)
    assert torch.allclose(left, (adversarial - clean) - (adversarial - clean) @ basis @ basis.T, atol=1e-5)
    with pytest.raises(UserError, match="whole and in order"):
        some(adversarial[:2])
