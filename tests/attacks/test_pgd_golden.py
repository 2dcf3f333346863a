"""PGD against recorded iterates of torchattacks and RobustVLM."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from golden import golden
from golden_models import golden_classifier
from recorded import RecordedDraws
from torch import Tensor, nn

from fastmat.attacks.objectives import SquaredL2FromClean
from fastmat.attacks.pgd import PGD
from fastmat.attacks.search import random_start
from fastmat.ops import momentum_step
from fastmat.types import AttackContext, Batch, ThreatModel

EPS = 8 / 255


class ClassCrossEntropy:
    def __init__(self, head: nn.Module, labels: Tensor) -> None:
        self.head, self.labels = head, labels

    def bind(self, model, batch, context):
        return lambda state: F.cross_entropy(self.head(state.embeds), self.labels, reduction="none")


def no_context(batch: Batch) -> AttackContext:
    features = torch.zeros(len(batch), 1)
    return AttackContext(
        image_features=features, image_group=batch.group, text_features=features, text_group=batch.group
    )


def attack(threat: ThreatModel, draws: dict[str, Tensor], *, steps: int, step_size: float, start: bool = True):
    model, head, batch, labels = golden_classifier()
    pgd = PGD(
        threat=threat,
        objective=ClassCrossEntropy(head, labels),
        steps=steps,
        step_size=step_size,
        random_start=start,
    )
    return pgd(model, batch, no_context(batch), draws=RecordedDraws(draws)).images


def share_different(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs() > 1e-6).float().mean().item()


def test_linf_final_images_with_random_start() -> None:
    _, recorded = golden("pgd")
    noise = {"start": recorded["pgd.start_noise"] / EPS}
    for steps in (2, 10):
        images = attack(ThreatModel(eps=EPS), noise, steps=steps, step_size=2 / 255)
        assert share_different(images, recorded["pgd.iterates"][steps]) <= 0.005


def test_linf_without_random_start() -> None:
    _, recorded = golden("pgd")
    images = attack(ThreatModel(eps=EPS), {}, steps=10, step_size=2 / 255, start=False)
    assert share_different(images, recorded["pgd_nors.final"]) <= 0.005


def test_l2_start_and_iterates() -> None:
    _, recorded = golden("pgd")
    threat = ThreatModel(eps=1.0, norm="l2")
    draws = {"start": recorded["pgdl2.start_normal"], "start_radius": recorded["pgdl2.start_radius"].flatten() * 2 - 1}
    batch = golden_classifier()[2]
    start = random_start(batch, threat, RecordedDraws(draws))
    torch.testing.assert_close(start, recorded["pgdl2.iterates"][0], atol=1e-6, rtol=0)
    for steps in (2, 10):
        images = attack(threat, draws, steps=steps, step_size=0.2)
        torch.testing.assert_close(images, recorded["pgdl2.iterates"][steps], atol=1e-5, rtol=0)


def test_fare_objective_reproduces_momentum_iterates() -> None:
    """Values and gradients of FARE's objective; the update itself is checked in tests/ops/test_pgd_golden.py."""
    _, recorded = golden("fare_pgd")
    model, _, batch, _ = golden_classifier()
    value = SquaredL2FromClean().bind(model, batch, no_context(batch))
    velocity = torch.zeros_like(batch.images)
    for before, after in pairwise(recorded["rvlm_linf_l2loss.iterates"]):
        x = before.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(value(model.encode_image(x)).mean(), x)
        step = momentum_step(
            before, velocity, gradient, batch.images, eps=4 / 255, step_size=1 / 255, decay=0.9, rule="fare"
        )
        assert share_different(step, after) <= 0.005
