"""DLR and AutoAttack's two runs of APGD against plain re-writings over class prompts, one image at a time."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from batches import random_batch
from torch import Tensor

from fastmat.attacks.apgd import APGD
from fastmat.attacks.apgd_classes import APGDClasses
from fastmat.attacks.base import context_of, text_features
from fastmat.attacks.dlr import DLR
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.margin import Margin
from fastmat.attacks.objectives import Contrastive, Objective
from fastmat.attacks.square import Square
from fastmat.errors import UserError
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.protocol import ImageState
from fastmat.models.tiny import tiny_clip
from fastmat.types import AttackContext, Batch, ThreatModel

CLASSES = ("dog", "cat", "red bird", "tree", "big house", "sits")
GROUPS = torch.tensor([30, 7, 12, 40, 5, 21])  # in no order
SCALE = 14.0
THREAT = ThreatModel(eps=4 / 255)


@pytest.fixture
def model() -> DualEncoder:
    return tiny_clip().eval()


def classes_of(model: DualEncoder, batch: Batch, labels: list[int]) -> tuple[Batch, AttackContext]:
    """The batch with classes in place of captions, as the task makes it."""
    features = text_features(model, CLASSES)
    with torch.no_grad():
        clean = model.encode_image(batch.images).features
    batch = replace(batch, group=GROUPS[labels])
    return batch, AttackContext(
        image_features=clean, image_group=batch.group, text_features=features, text_group=GROUPS
    )


def state_of(features: Tensor) -> ImageState:
    return ImageState(tokens=None, embeds=features, features=features)


def plain_dlr(z: Tensor, right: int, target: int | None) -> Tensor:
    """Of the C logits of one image; the targeted form towards class `target`."""
    ordered = sorted(range(len(z)), key=lambda c: -float(z[c].detach()))
    if target is not None:
        return -(z[right] - z[target]) / (z[ordered[0]] - (z[ordered[2]] + z[ordered[3]]) / 2)
    wrong = next(c for c in ordered if c != right)
    return -(z[right] - z[wrong]) / (z[ordered[0]] - z[ordered[2]])


@pytest.mark.parametrize("target", [None, 0, 1, 4])
def test_values_and_gradients_are_those_of_the_paper(model: DualEncoder, target: int | None) -> None:
    batch, labels = random_batch((1,) * 8, seed=3), [0, 1, 2, 3, 4, 5, 0, 2]
    batch, context = classes_of(model, batch, labels)
    features = F.normalize(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    features = features[:, : context.text_features.shape[1]].clone().requires_grad_()
    found = DLR(target=target).bind(model, batch, context)(state_of(features))
    (gradient,) = torch.autograd.grad(found.sum(), features)
    for i, right in enumerate(labels):
        clean = SCALE * context.text_features.double() @ context.image_features[i].double()
        wrong = sorted((c for c in range(6) if c != right), key=lambda c: -float(clean[c]))
        own = features[i].detach().double().requires_grad_()
        value = plain_dlr(
            SCALE * context.text_features.double() @ own, right, None if target is None else wrong[target]
        )
        (expected,) = torch.autograd.grad(value, own)
        assert found[i].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5)
        torch.testing.assert_close(gradient[i].double(), expected, rtol=1e-3, atol=1e-3)


def test_cross_entropy_of_classes_is_contrastive_from_image_to_text(model: DualEncoder) -> None:
    labels = [5, 1, 1, 0]
    batch, context = classes_of(model, random_batch((1, 2, 1, 1)), labels)
    images = batch.images.clone().requires_grad_()
    found = Contrastive(directions="i2t").bind(model, batch, context)(model.encode_image(images))
    logits = model.logit_scale * model.encode_image(images).features @ context.text_features.T
    expected = F.cross_entropy(logits, torch.tensor(labels), reduction="none")
    torch.testing.assert_close(found, expected)
    (a,), (b,) = (torch.autograd.grad(values.sum(), images) for values in (found, expected))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("objective", [DLR(), DLR(target=0), Margin(), Contrastive(directions="i2t")])
def test_every_image_attack_takes_classes(model: DualEncoder, objective: Objective) -> None:
    batch, context = classes_of(model, random_batch(), [0, 3, 4, 4])
    value = objective.bind(model, batch, context)
    with torch.no_grad():
        before = value(model.encode_image(batch.images))
        for attack in (
            APGD(threat=THREAT, objective=objective, steps=5),
            Square(threat=THREAT, objective=objective, n_queries=20),
        ):
            after = value(model.encode_image(attack(model, batch, context).images))
            assert bool((after >= before - 1e-5).all()) and float((after - before).sum()) > 1e-4


def plain_runs(
    model: DualEncoder, batch: Batch, context: AttackContext, labels: list[int], attack: APGDClasses
) -> list:
    """Per image, whether any iterate of any run is misclassified: APGD with every image to the end of every run."""
    lost = [False] * len(batch)
    seen: list[Tensor] = []

    class Watched:
        def __init__(self, objective: Objective) -> None:
            self.objective = objective

        def bind(self, model, batch, context):
            value = self.objective.bind(model, batch, context)

            def watched(state):
                seen.append((state.features.detach() @ context.text_features.T).argmax(1))
                return value(state)

            return watched

    class Renamed(SeededDraws):
        """The first start of an attack is the start of run `number`."""

        def __init__(self, number: int) -> None:
            super().__init__(attack.seed)
            self.number = number

        def uniform(self, name, index, shape):
            return super().uniform(f"start/{self.number}" if name == "start/0" else name, index, shape)

    objectives = [Contrastive(directions="i2t")] * attack.restarts
    objectives += [DLR(target=target) for target in range(min(attack.targets, 5))]
    seen.append((context.image_features @ context.text_features.T).argmax(1))
    for number, objective in enumerate(objectives):
        APGD(threat=attack.threat, objective=Watched(objective), steps=attack.steps)(
            model, batch, context, draws=Renamed(number)
        )
    for classes in seen:
        lost = [a or int(c) != label for a, c, label in zip(lost, classes, labels, strict=True)]
    return lost


@pytest.mark.parametrize(("restarts", "targets"), [(2, 0), (0, 9), (1, 2)])
def test_an_image_is_lost_when_any_iterate_of_any_run_is_misclassified(
    model: DualEncoder, restarts: int, targets: int
) -> None:
    clean = random_batch((1,) * 12, seed=1)
    with torch.no_grad():
        labels = (model.encode_image(clean.images).features @ text_features(model, CLASSES).T).argmax(1).tolist()
    labels[3] = (labels[3] + 1) % 6  # wrong from the start
    batch, context = classes_of(model, clean, labels)
    margin = Margin().bind(model, batch, context)
    fates = set()
    for eps in (1e-4, 1e-3, 4e-3):
        attack = APGDClasses(threat=ThreatModel(eps=eps), steps=6, restarts=restarts, targets=targets, seed=5)
        result = attack(model, batch, context)
        with torch.no_grad():
            lost = margin(model.encode_image(result.images)) > 0
        assert lost.tolist() == plain_runs(model, batch, context, labels, attack)
        assert torch.equal(result.images[3], batch.images[3]) and bool(lost[3])
        assert result.texts == batch.texts
        halves = [attack(model, batch.rows(a, b), context).images for a, b in ((0, 5), (5, 12))]
        assert torch.equal(torch.cat(halves), result.images)
        fates |= set(lost.tolist()[4:])
    assert fates == {True, False}


def test_an_image_that_is_lost_is_left_alone(model: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = random_batch((1,) * 4)
    with torch.no_grad():
        nearest = (model.encode_image(clean.images).features @ text_features(model, CLASSES).T).argmax(1)
    batch, context = classes_of(model, clean, ((nearest + 1) % 6).tolist())
    encoded = []
    plain = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda images: encoded.append(len(images)) or plain(images))
    result = APGDClasses(threat=THREAT)(model, batch, context)
    assert encoded == [4] and torch.equal(result.images, batch.images)


def test_every_run_starts_somewhere_else(model: DualEncoder) -> None:
    clean, asked = random_batch((1,) * 4), []
    with torch.no_grad():
        nearest = (model.encode_image(clean.images).features @ text_features(model, CLASSES).T).argmax(1)
    batch, context = classes_of(model, clean, nearest.tolist())

    class Recorded(SeededDraws):
        def uniform(self, name, index, shape):
            asked.append(name)
            return super().uniform(name, index, shape)

    APGDClasses(threat=ThreatModel(eps=1e-7), steps=1, restarts=2, targets=3)(model, batch, context, draws=Recorded(0))
    assert asked == [f"start/{number}" for number in range(5)]


def test_refusals(model: DualEncoder) -> None:
    with pytest.raises(UserError, match="at least one run, got 0 and 0"):
        APGDClasses(threat=THREAT, restarts=0, targets=0)
    with pytest.raises(UserError, match="steps must be at least 1"):
        APGDClasses(threat=THREAT, steps=0)
    with pytest.raises(UserError, match="target is a place among the wrong classes, counted from 0, got -1"):
        DLR(target=-1)
    captions = random_batch()
    for attack in (APGDClasses(threat=THREAT), APGD(threat=THREAT, objective=DLR())):
        with pytest.raises(UserError, match=r"one text for each class.*zero_shot"):
            attack(model, captions, context_of(model, captions))
    batch, context = classes_of(model, captions, [0, 1, 0, 2])
    three = replace(context, text_features=context.text_features[:3], text_group=GROUPS[:3])
    with pytest.raises(UserError, match=r"the targeted difference .* needs 4 classes, here are 3.*targets"):
        APGDClasses(threat=ThreatModel(eps=1e-6), steps=1)(model, batch, three)
    APGDClasses(threat=THREAT, steps=1, targets=0)(model, batch, three)
    with pytest.raises(UserError, match="the difference of logits ratio needs 3 classes, here are 2"):
        two = replace(context, text_features=context.text_features[:2], text_group=GROUPS[:2])
        DLR().bind(model, replace(batch, group=GROUPS[[0, 1, 0, 1]]), two)
    with pytest.raises(UserError, match="target must be below 5, the number of wrong classes, got 5"):
        DLR(target=5).bind(model, batch, context)
    with pytest.raises(UserError, match="one text for each class"):
        DLR().bind(model, replace(batch, group=GROUPS[[0, 1, 2, 3]] + 1), context)
