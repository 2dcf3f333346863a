"""Folded norms: the same map and the same gradient, wherever it is safe, and nothing of it left behind."""

from collections.abc import Callable

import pytest
import torch
from batches import random_batch
from torch import Tensor, nn

from fastmat.attacks.base import frozen
from fastmat.attacks.engine import Engine
from fastmat.attacks.folding import folded
from fastmat.attacks.pgd import PGD
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.tiny import tiny_clip
from fastmat.types import ThreatModel


class Tower(nn.Module):
    """Two convolutions and norms, wired by `wire`."""

    def __init__(self, wire: Callable[["Tower", Tensor], Tensor], width: int, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, 1, 1, groups=2, bias=bias)
        self.bn2 = nn.BatchNorm2d(8, affine=not bias)
        self.head = nn.Linear(8, width)
        self.wire = wire
        for norm in (self.bn1, self.bn2):
            assert norm.running_mean is not None and norm.running_var is not None
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            if norm.affine:
                nn.init.normal_(norm.weight, 1, 0.3)
                nn.init.normal_(norm.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return self.head(self.wire(self, images).mean((2, 3))), None


def plain(t: Tower, x: Tensor) -> Tensor:
    return t.bn2(t.conv2(t.bn1(t.conv1(x)).relu()))


def crossed(t: Tower, x: Tensor) -> Tensor:
    """Registered in an order that misleads: the second norm follows the first convolution."""
    return t.bn1(t.conv2(t.bn2(t.conv1(x)).relu()))


def read_twice(t: Tower, x: Tensor) -> Tensor:
    y = t.conv1(x)
    return t.bn1(y) + y


def norm_first(t: Tower, x: Tensor) -> Tensor:
    y = t.conv1(x)
    return t.conv2(t.bn1(y + 1).relu())


def changed_in_place(t: Tower, x: Tensor) -> Tensor:
    return t.bn1(t.conv1(x).mul_(2))


def run_twice(t: Tower, x: Tensor) -> Tensor:
    return t.bn1(t.conv2(t.bn1(t.conv1(x))))


def model_with(wire: Callable[[Tower, Tensor], Tensor], bias: bool = False) -> DualEncoder:
    torch.manual_seed(0)
    model = tiny_clip()
    width = model.image_projection.in_features
    assert isinstance(width, int)
    model.image_tower = Tower(wire, width, bias)
    return model


def is_folded(norm: nn.Module) -> bool:
    return "forward" in vars(norm)


@pytest.mark.parametrize(
    "wire, folds",
    [
        (plain, (True, True)),
        (crossed, (True, True)),
        (read_twice, (False, False)),
        (norm_first, (False, False)),
        (changed_in_place, (False, False)),
        (run_twice, (False, False)),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_only_what_is_the_same_map_is_folded(
    wire: Callable[[Tower, Tensor], Tensor], folds: tuple[bool, bool], bias: bool
) -> None:
    model = model_with(wire, bias)
    tower = model.image_tower
    images = torch.rand(3, 3, 16, 16, requires_grad=True)
    with frozen(model):
        expected = model.encode_image(images).embeds
        (gradient,) = torch.autograd.grad(expected.sin().sum(), images)
        with folded(model):
            assert (is_folded(tower.bn1), is_folded(tower.bn2)) == folds
            actual = model.encode_image(images).embeds
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
            (again,) = torch.autograd.grad(actual.sin().sum(), images)
            torch.testing.assert_close(again, gradient, rtol=1e-3, atol=1e-6)
        assert not any("forward" in vars(module) for module in model.modules())
        assert torch.equal(model.encode_image(images).embeds, expected)


def test_norms_of_the_batch_stay() -> None:
    model = model_with(plain).train()
    with folded(model):
        assert not is_folded(model.image_tower.bn1)
    model.eval()
    with folded(model):
        assert is_folded(model.image_tower.bn1)


def test_weights_that_change_between_attacks_are_seen() -> None:
    model = model_with(plain).eval()
    images = torch.rand(2, 3, 16, 16)
    with folded(model):
        before = model.encode_image(images).embeds
    with torch.no_grad():
        model.image_tower.conv1.weight.mul_(2)
        model.image_tower.bn2.running_mean.add_(1)
    with folded(model):
        after = model.encode_image(images).embeds
    torch.testing.assert_close(after, model.encode_image(images).embeds, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after, rtol=1e-2)


def test_an_attack_folds_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(plain).eval()
    seen: list[bool] = []
    encode = model.encode_image

    def spy(images: Tensor) -> object:
        seen.append(is_folded(model.image_tower.bn1))
        return encode(images)

    monkeypatch.setattr(model, "encode_image", spy)
    attack, batch = PGD(threat=ThreatModel(eps=8 / 255), steps=2), random_batch((1, 2, 1))
    attack(model, batch, engine=Engine(fold=False))
    assert not any(seen)
    seen.clear()
    attack(model, batch)
    assert all(seen[-2:])


@pytest.mark.parametrize("outside", [False, True])
def test_bf16_folds_too(outside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be folded is found in fp32, whatever the attack, or the training step around it, runs in."""
    model = model_with(plain).eval()
    seen: list[bool] = []
    tower = model.image_tower.forward
    monkeypatch.setattr(
        model.image_tower, "forward", lambda x: (seen.append(is_folded(model.image_tower.bn1)), tower(x))[1]
    )
    attack, batch = PGD(threat=ThreatModel(eps=8 / 255), steps=2), random_batch((1, 2, 1))
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        attack(model, batch, engine=Engine(precision="bf16"))
    assert all(seen[-2:])
