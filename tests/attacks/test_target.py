"""Targeted attacks: towards the caption given, each image alone, judged by the target's rank."""

import json

import pytest
import torch
from batches import random_batch

from fastmat.attacks.apgd import APGD
from fastmat.attacks.base import context_of, text_features
from fastmat.attacks.mi_fgsm import MIFGSM
from fastmat.attacks.pgd import PGD
from fastmat.attacks.square import Square
from fastmat.attacks.target import Target, target_ranks
from fastmat.build import check, construct
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.types import ThreatModel

CAPTION = "a small green bird under the house"
THREAT = ThreatModel(eps=8 / 255)
ATTACKS = {
    "pgd": lambda target: PGD(threat=THREAT, objective=target),
    "mi_fgsm": lambda target: MIFGSM(threat=THREAT, objective=target),
    "apgd": lambda target: APGD(threat=THREAT, objective=target, steps=12),
    "square": lambda target: Square(threat=THREAT, objective=target, n_queries=80),
}


@pytest.fixture(scope="module")
def model():
    return tiny_clip().eval()


def judged(model, batch, images, targets):
    """Cosine to the target and its rank among all captions of the batch and the targets."""
    with torch.no_grad():
        features = model.encode_image(images).features
    own = text_features(model, targets)
    gallery = text_features(model, [*batch.texts, *targets])
    return (features * own).sum(1), target_ranks(features, own, gallery)


@pytest.mark.parametrize("form", ["cosine", "contrastive"])
@pytest.mark.parametrize("name", ATTACKS)
def test_images_come_nearer_to_their_own_target(name, form, model) -> None:
    batch = random_batch((2, 1, 3, 2, 1, 1))
    targets = [f"{CAPTION} {word}" for word in ("red", "dog", "tree", "cat", "sits", "runs")]
    captions = {10 + i: caption for i, caption in enumerate(targets)}
    result = ATTACKS[name](Target(captions=captions, form=form))(model, batch)
    before, rank_before = judged(model, batch, batch.images, targets)
    after, rank_after = judged(model, batch, result.images, targets)
    if form == "cosine":
        assert (after > before).all()
    else:
        assert (rank_after <= rank_before).all()
    assert rank_after.sum() < rank_before.sum()
    assert result.texts == batch.texts and (result.distance > 0).all()


@pytest.mark.parametrize("form", ["cosine", "contrastive"])
def test_value_is_its_definition(form, model) -> None:
    batch = random_batch()
    context = context_of(model, batch)
    with torch.no_grad():
        state = model.encode_image(batch.images)
    value = Target(caption=CAPTION, form=form).bind(model, batch, context)(state)
    cosine = state.features @ text_features(model, [CAPTION])[0]
    scale = model.logit_scale.detach()
    share = scale * cosine - (scale * state.features @ context.text_features.T).logsumexp(1)
    torch.testing.assert_close(value, cosine if form == "cosine" else share)


@pytest.mark.parametrize("form", ["cosine", "contrastive"])
def test_split_changes_nothing(form, model) -> None:
    batch = random_batch((2, 1, 3, 2))
    context = context_of(model, batch)
    attack = PGD(threat=THREAT, objective=Target(captions={i: f"{CAPTION} {i}" for i in range(10, 14)}, form=form))
    whole = attack(model, batch, context).images
    parts = [attack(model, batch.rows(i, i + 1), context).images for i in range(4)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=0)


def test_captions_from_a_config(tmp_path, model) -> None:
    batch = random_batch((1, 1))
    inline = construct(Target, {"captions": {"10": "a dog", "11": "a cat"}}, where="objective")
    (tmp_path / "map.json").write_text(json.dumps({"11": "a cat", "10": "a dog", "900": "a bird"}))
    (tmp_path / "list.json").write_text(json.dumps(["none"] * 10 + ["a dog", "a cat"]))
    files = [construct(Target, {"captions": str(tmp_path / n)}, where="") for n in ("map.json", "list.json")]
    listed = construct(Target, {"captions": ["none"] * 10 + ["a dog", "a cat"]}, where="")
    assert all(target.of(batch) == ["a dog", "a cat"] for target in (inline, *files, listed))
    assert construct(Target, {"caption": "a dog"}, where="").of(batch) == ["a dog"] * 2
    torch.testing.assert_close(inline.features(model, batch), text_features(model, ["a dog", "a cat"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of caption and captions"),
        ({"caption": "a dog", "captions": {0: "a dog"}}, "exactly one of caption and captions"),
        ({"caption": "  "}, "caption must be a text that is not empty"),
        ({"captions": {"dog.jpg": "a dog"}}, "no position of an image"),
        ({"captions": {-1: "a dog"}}, "no position of an image"),
        ({"captions": ["a dog", ""]}, r"captions\[1\] must be a text"),
        ({"captions": [3]}, r"captions\[0\] must be a text"),
        ({"captions": "nowhere.json"}, "nowhere.json cannot be read as JSON"),
        ({"caption": "a dog", "form": "margin"}, "form must be 'cosine' or 'contrastive'"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        Target(**arguments)


@pytest.mark.parametrize("content", ['"a dog"', "{", "3", '{"0": null}'])
def test_bad_files(content, tmp_path) -> None:
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(UserError, match="captions"):
        Target(captions=tmp_path / "captions.json")


def test_wrong_types_in_a_config_are_named() -> None:
    with pytest.raises(UserError, match=r"objective\.caption"):
        check(Target, {"caption": 7}, where="objective")


def test_an_image_without_target_is_named(model) -> None:
    with pytest.raises(UserError, match="2 of 3 have none, the first at position 11"):
        PGD(threat=THREAT, objective=Target(captions={10: "a dog"}))(model, random_batch((1, 1, 1)))


def test_ranks_one_at_a_time() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.nn.functional.normalize(torch.randn(700, 8, generator=generator), dim=1)
    features, gallery = rows[:300], rows[300:]
    target = gallery[torch.randint(400, (300,), generator=generator)]
    expected = [sum(float(f @ g) > float(f @ t) + 1e-6 for g in gallery) for f, t in zip(features, target, strict=True)]
    assert target_ranks(features, target, gallery).tolist() == expected
    assert target_ranks(features[:1] * float("nan"), target[:1], gallery).tolist() == [400]
