import pytest
import torch
from batches import random_batch
from torch import Tensor

from fastmat.attacks.apgd import APGD, ascend_adaptively, farthest_start
from fastmat.attacks.base import context_of
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.mi_fgsm import MIFGSM
from fastmat.attacks.objectives import Contrastive
from fastmat.attacks.pgd import PGD
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.types import ThreatModel

LINF, L2 = ThreatModel(eps=8 / 255), ThreatModel(eps=1.0, norm="l2")


def value_of(model, batch, images: Tensor, context) -> Tensor:
    with torch.no_grad():
        return Contrastive().bind(model, batch, context)(model.encode_image(images))


def bumpy(x: Tensor) -> Tensor:
    """[B] a rugged function with many bends inside the ball, negative at first for some."""
    flat = x.flatten(1)
    weight = torch.linspace(-1, 1, flat.shape[1])
    return (20 * flat).sin() @ weight + 3 * (flat * weight.sign()).sum(1)


def plain_apgd(value, x0: Tensor, start: Tensor, threat: ThreatModel, steps: int) -> Tensor:
    """One image, step by step, in words of the paper."""

    def inside(z: Tensor) -> Tensor:
        delta = z - x0
        if threat.norm == "linf":
            delta = delta.clamp(-threat.eps, threat.eps)
        elif delta.norm() > threat.eps:
            delta = delta * threat.eps / delta.norm()
        return (x0 + delta).clamp(*threat.bounds)

    def evaluate(z: Tensor) -> tuple[float, Tensor]:
        live = z.clone().requires_grad_(True)
        out = value(live[None])[0]
        return out.item(), torch.autograd.grad(out, live)[0]

    checkpoints, width, place = [], max(int(0.22 * steps), 1), 0
    while place + width <= steps:
        place += width
        checkpoints.append(place)
        width = max(width - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    x, previous, size = start, start, 2 * threat.eps
    loss, grad = evaluate(x)
    losses, best, best_loss, best_grad = [loss], x, loss, grad
    last_check, best_then, halved_then = 0, loss, True
    for k in range(1, steps + 1):
        direction = grad.sign() if threat.norm == "linf" else grad / grad.norm()
        z = inside(x + size * direction)
        inertia = 1.0 if k == 1 else 0.75
        previous, x = x, inside(x + inertia * (z - x) + (1 - inertia) * (x - previous))
        loss, grad = evaluate(x)
        losses.append(loss)
        if loss > best_loss:
            best, best_loss, best_grad = x, loss, grad
        if k in checkpoints:
            rises = sum(losses[j] > losses[j - 1] for j in range(last_check + 1, k + 1))
            stuck = rises <= 0.75 * (k - last_check) or (not halved_then and best_then >= best_loss)
            if stuck:
                size, x, grad = size / 2, best, best_grad
            last_check, best_then, halved_then = k, best_loss, stuck
    return best


@pytest.mark.parametrize("steps", [1, 2, 7, 25])
@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_equals_the_plain_one(threat: ThreatModel, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(6, 3, 4, 4, generator=generator)
    start = (x0 + 0.02 * torch.randn(x0.shape, generator=generator)).clamp(0, 1)
    start = torch.where((start - x0).abs() <= threat.eps, start, x0)
    got, values = ascend_adaptively(bumpy, x0, start, threat=threat, steps=steps)
    want = torch.stack([plain_apgd(bumpy, a, b, threat, steps) for a, b in zip(x0, start, strict=True)])
    torch.testing.assert_close(values, bumpy(want), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(values, bumpy(got), atol=1e-4, rtol=1e-5)


def test_an_empty_history_hides_a_fall() -> None:
    """Published: at the first checkpoint a value above 0 counts as a rise, even below the start's."""

    def falling(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return 1 - (x - 0.5).abs().flatten(1).sum(1)

    x0, runs = torch.full((1, 3, 2, 2), 0.501), []
    for zero_history in (False, True):
        seen: list[Tensor] = []
        ascend_adaptively(falling, x0, x0, threat=ThreatModel(eps=0.01), steps=8, zero_history=zero_history)
        runs.append(seen)
    assert torch.equal(runs[0][1], runs[1][1]) and falling(runs[0][1]) < falling(x0)
    # Correct: back to the start, then half as far as the first time. Published: on from where it fell to.
    torch.testing.assert_close(runs[0][2], torch.full_like(x0, 0.4935))
    torch.testing.assert_close(runs[1][2], torch.full_like(x0, 0.5035))


def test_stronger_than_pgd_and_inside_the_budget() -> None:
    model, batch = tiny_clip().eval(), random_batch()
    context = context_of(model, batch)
    for threat in (LINF, L2):
        plain = PGD(threat=threat, steps=20)(model, batch, context)
        adaptive = APGD(threat=threat, steps=20)(model, batch, context)
        assert (
            value_of(model, batch, adaptive.images, context).mean()
            > value_of(model, batch, plain.images, context).mean()
        )
        assert (adaptive.distance <= threat.eps + 1e-6).all() and adaptive.texts == batch.texts


def test_more_restarts_never_hurt_any_image() -> None:
    model, batch = tiny_clip().eval(), random_batch()
    context = context_of(model, batch)
    values = [
        value_of(model, batch, APGD(threat=LINF, steps=4, restarts=n)(model, batch, context).images, context)
        for n in (1, 2, 4)
    ]
    assert (values[1] >= values[0] - 1e-6).all() and (values[2] >= values[1] - 1e-6).all()
    assert values[2].mean() > values[0].mean()


@pytest.mark.parametrize("attack", [APGD(threat=LINF, steps=6, restarts=2), MIFGSM(threat=LINF, steps=4)])
def test_splitting_a_batch_changes_nothing(attack) -> None:
    model, batch = tiny_clip().eval(), random_batch((2, 1, 3, 2, 1))
    context = context_of(model, batch)
    whole = attack(model, batch, context).images
    parts = torch.cat([attack(model, batch.rows(a, b), context).images for a, b in ((0, 2), (2, 5))])
    assert ((whole - parts).abs() > 1e-5).float().mean() <= 0.01


def test_starts_touch_the_ball() -> None:
    batch = random_batch()
    draws = SeededDraws(0)
    free = ThreatModel(eps=0.05, bounds=(-1.0, 2.0))
    delta = farthest_start(batch, free, draws, 0) - batch.images
    torch.testing.assert_close(delta.flatten(1).abs().amax(1), torch.full((len(batch),), 0.05))
    free = ThreatModel(eps=0.5, norm="l2", bounds=(-1.0, 2.0))
    delta = farthest_start(batch, free, draws, 1) - batch.images
    torch.testing.assert_close(delta.flatten(1).norm(dim=1), torch.full((len(batch),), 0.5))


def test_no_radius_no_change() -> None:
    model, batch = tiny_clip().eval(), random_batch()
    for attack in (APGD(threat=ThreatModel(eps=0.0), steps=2), MIFGSM(threat=ThreatModel(eps=0.0), steps=2)):
        assert torch.equal(attack(model, batch).images, batch.images)


def test_mi_fgsm_equals_the_plain_one() -> None:
    model, batch = tiny_clip().eval().requires_grad_(False), random_batch()
    context = context_of(model, batch)
    value = Contrastive().bind(model, batch, context)
    x, velocity = batch.images, torch.zeros_like(batch.images)
    for _ in range(5):
        live = x.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(value(model.encode_image(live)).sum(), live)
        velocity = 0.7 * velocity + grad / grad.abs().sum((1, 2, 3), keepdim=True)
        x = x + LINF.eps / 5 * velocity.sign()
        x = (batch.images + (x - batch.images).clamp(-LINF.eps, LINF.eps)).clamp(0, 1)
    got = MIFGSM(threat=LINF, steps=5, decay=0.7)(model, batch, context).images
    assert ((got - x).abs() > 1e-5).float().mean() <= 0.005
    assert not torch.equal(
        got, PGD(threat=LINF, steps=5, step_size=LINF.eps / 5, random_start=False)(model, batch).images
    )


def test_bad_input() -> None:
    with pytest.raises(UserError, match="steps must be at least 1"):
        APGD(threat=LINF, steps=0)
    with pytest.raises(UserError, match="restarts must be at least 1"):
        APGD(threat=LINF, restarts=0)
    with pytest.raises(UserError, match="restarts must be 1 without random_start"):
        APGD(threat=LINF, restarts=2, random_start=False)
    with pytest.raises(UserError, match="decay must not be negative"):
        MIFGSM(threat=LINF, decay=-1.0)
    with pytest.raises(UserError, match="step_size"):
        MIFGSM(threat=LINF, step_size=-1.0)
