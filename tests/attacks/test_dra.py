"""DRA against a plain restatement of the published loop, and its sampler against the published one."""

from fractions import Fraction

import pytest
import torch
from batches import random_batch
from oracles.three_guides import plain_texts
from tiny_mlm import tiny_candidates, tiny_captions
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from fastmat.attacks.base import context_of
from fastmat.attacks.dra import DRA, mixture_weights
from fastmat.attacks.draws import SeededDraws
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.types import Batch, ThreatModel

THREAT = ThreatModel(eps=32 / 255, max_words=1)  # far enough for the moved images to choose other words
OFFICIAL = DRA.official.but(round_trip=False, text_max_length=30)
SCALES = (0.5, 0.75, 1.25, 1.5)


def words_batch(captions: tuple[int, ...] = (2, 1, 3)) -> Batch:
    batch = random_batch(captions)
    return batch.replace(texts=tuple(tiny_captions(sum(captions), seed=3)))


def published_chances() -> dict[tuple[int, int, int], Fraction]:
    """Every triple's probability, by walking through all draws of the published sampler."""
    kept: dict[tuple[int, int, int], Fraction] = {}
    for first in range(1, 101):
        seconds = range(1, 101 - first)
        if first >= 99:
            kept[98, 1, 1] = kept.get((98, 1, 1), Fraction(0)) + Fraction(1, 100)
            continue
        for second in seconds:
            if first + second < 100:
                triple = first, second, 100 - first - second
                kept[triple] = kept.get(triple, Fraction(0)) + Fraction(1, 100 * len(seconds))
    total = sum(kept.values())
    return {triple: chance / total for triple, chance in kept.items()}


def plain_weights(u: float, v: float, chances: dict[tuple[int, int, int], Fraction]) -> tuple[float, float, float]:
    """The first by its distribution function at u in [0, 1], the second at v among those that are left."""
    reached = 0.0
    for first in range(1, 99):
        reached += float(sum(chance for triple, chance in chances.items() if triple[0] == first))
        if u <= reached or first == 98:
            break
    second = 1 + int(v * (99 - first))
    return first / 100, second / 100, (100 - first - second) / 100


def plain_images(
    model, batch: Batch, targets: Tensor, *, antialias: bool, steps: int, seed: int, shared: bool
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Final and last but one iterate, the whole batch in one graph; and what was chosen, per step and image."""
    draws, chances, x0, eps = SeededDraws(seed), published_chances(), batch.images, THREAT.eps

    def loss(images: Tensor) -> Tensor:
        similarity = model.encode_image(images).features @ targets.T
        labels = torch.zeros_like(similarity)
        for t, i in enumerate(batch.txt2img.tolist()):
            labels[i, t] = 1
        return -(similarity * labels).sum(-1)

    def gradient(images: Tensor, step: int | None) -> Tensor:
        live = images.detach().requires_grad_(True)
        total = loss(live).sum()
        for k, scale in enumerate(SCALES if step is not None else ()):
            noise = 0.05 * draws.normal(f"scale/{step}/{k}", batch.index, x0.shape[1:])
            down = resize(live + noise, [int(32 * scale)] * 2, InterpolationMode.BICUBIC, antialias=antialias)
            back = resize(down.clamp(0, 1), [32, 32], InterpolationMode.BICUBIC, antialias=antialias)
            total = total + loss(back).sum()
        return torch.autograd.grad(total, live)[0]

    x = (x0 + eps * draws.uniform("start", batch.index, x0.shape[1:])).clamp(0, 1)
    previous, choices = x, []
    for step in range(steps):
        base = x
        if step > 0:
            index = batch.index[:1].expand(len(batch)) if shared else batch.index
            unit = (draws.uniform(f"mixture/{step}", index, (5, 2)) + 1) / 2
            points, values = [], []
            for k in range(5):
                rows = []
                for i in range(len(batch)):
                    a, b, c = plain_weights(*unit[i, k].tolist(), chances)
                    rows.append(a * x[i] + b * x0[i] + c * previous[i])
                points.append(torch.stack(rows))
                values.append(loss(x + eps / 4 * gradient(points[-1], None).sign()).detach())
            table = torch.stack(values)
            best = table.mean(1).argmax().expand(len(batch)) if shared else table.argmax(0)
            choices.append(best.tolist())
            base = torch.stack([points[k][i] for i, k in enumerate(best.tolist())])
        moved = x + eps / 4 * gradient(base, step).sign()
        x, previous = (x0 + (moved - x0).clamp(-eps, eps)).clamp(0, 1), x
    return x, previous, choices


@pytest.mark.parametrize("choice", ["image", "batch"])
@pytest.mark.parametrize("quirks", [Quirks(), OFFICIAL], ids=["correct", "official"])
def test_dra_equals_the_plain_one(quirks: Quirks, choice) -> None:
    model, batch = tiny_clip(seed=2).eval().requires_grad_(False), words_batch()
    attack = DRA(threat=THREAT, candidates=tiny_candidates(), steps=4, choice=choice, quirks=quirks, seed=5)
    result = attack(model, batch)
    x0 = batch.images
    first = plain_texts(model, batch, [(1.0, x0), (0.0, x0), (0.0, x0)], quirks)
    with torch.no_grad():
        rows = [model.encode_text(model.tokenize([text], max_length=quirks.text_max_length)).features for text in first]
    targets = torch.cat(rows)
    images, previous, choices = plain_images(
        model, batch, targets, antialias=quirks.antialias, steps=4, seed=5, shared=choice == "batch"
    )
    # One gradient near zero may round to the other sign, and moves its neighbours in the steps after.
    assert ((result.images - images).abs() > 1e-5).float().mean() <= 0.01
    assert list(result.texts) == plain_texts(model, batch, [(0.6, x0), (0.2, images), (0.2, previous)], quirks)
    assert first != list(batch.texts)
    assert len({k for step in choices for k in step}) > 1
    assert (choice == "image") == any(len(set(step)) > 1 for step in choices)


def test_the_sampler_is_the_published_one() -> None:
    chances = published_chances()
    lattice = [(torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1 for n in (1500, 1500)]
    draw = torch.cartesian_prod(*lattice).float()
    weights = mixture_weights(draw)
    percent = (weights * 100).round().long()
    assert (percent.sum(1) == 100).all() and percent.min() == 1
    count = torch.zeros(101, 101)
    count.index_put_((percent[:, 0], percent[:, 1]), torch.ones(()), accumulate=True)
    expected = torch.zeros(101, 101)
    for (first, second, _), chance in chances.items():
        expected[first, second] = float(chance)
    torch.testing.assert_close(count.sum(1) / len(draw), expected.sum(1), atol=1e-3, rtol=0)
    assert (count / len(draw) - expected).abs().sum() < 0.06  # the lattice's own coarseness
    ends = mixture_weights(torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]))
    assert ends.mul(100).round().int().tolist() == [[1, 1, 98], [1, 98, 1], [98, 1, 1], [98, 1, 1]]


def test_the_text_weights_say_which_image_the_text_leaves() -> None:
    model, batch = tiny_clip(seed=2).eval().requires_grad_(False), words_batch((4, 4, 4))

    def result(steps: int, *weights: int):
        # Steps across the whole ball, so that the text leaves each of three images in its own way.
        attack = DRA(
            threat=THREAT, candidates=tiny_candidates(), steps=steps, step_size=2 * THREAT.eps, text_weights=weights
        )
        return attack(model, batch)

    words = DRA(threat=THREAT, candidates=tiny_candidates()).sga.words
    plan = words.plan(model, batch.texts)
    iterates = [batch.images, result(2, 1, 0, 0).images, result(1, 1, 0, 0).images]
    away = [words.search(model, plan, model.encode_image(x).features[batch.txt2img]) for x in iterates]
    assert [result(2, *weights).texts for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1))] == away
    assert len(set(away)) == 3


def test_splitting_a_batch_changes_nothing() -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch((2, 1, 3, 2))
    attack = DRA(threat=THREAT, candidates=tiny_candidates(), steps=4)
    context = context_of(model, batch)
    whole = attack(model, batch, context)
    parts = [attack(model, batch.rows(a, b), context) for a, b in ((0, 1), (1, 4))]
    # Batched convolutions round differently.
    assert ((whole.images - torch.cat([part.images for part in parts])).abs() > 1e-5).float().mean() <= 0.01
    assert whole.texts == sum((part.texts for part in parts), ())


def test_the_published_choice_depends_on_the_batch() -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch((2, 1, 3, 2))
    attack = DRA(threat=THREAT, candidates=tiny_candidates(), steps=4, choice="batch")
    whole, alone = attack(model, batch).images, attack(model, batch.rows(3, 4)).images
    assert ((whole[3:] - alone).abs() > 1e-5).float().mean() > 0.05


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_both_budgets_hold_and_the_similarity_falls(norm) -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch()
    threat = ThreatModel(eps=8 / 255 if norm == "linf" else 1.0, norm=norm, max_words=1)
    attack = DRA(threat=threat, candidates=tiny_candidates(), steps=10)
    result = attack(model, batch)
    assert result.distance.max() <= threat.eps + 1e-6 and result.distance.min() > 0.5 * threat.eps
    assert result.images.min() >= 0 and result.images.max() <= 1
    assert result.words_changed.max() == 1

    def similarity(images: Tensor, texts: tuple[str, ...]) -> Tensor:
        with torch.no_grad():
            features = model.encode_image(images).features[batch.txt2img]
        return (features * attack.sga.words.features(model, texts)).sum(1)

    assert (similarity(result.images, result.texts) < similarity(batch.images, batch.texts)).all()


def test_no_budget_no_change() -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch()
    result = DRA(threat=ThreatModel(eps=0, max_words=0), candidates=tiny_candidates(), steps=2)(model, batch)
    assert torch.equal(result.images, batch.images) and result.texts == batch.texts


def test_one_step_and_a_step_of_nothing_run() -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch()
    assert DRA(threat=THREAT, candidates=tiny_candidates(), steps=1)(model, batch).distance.max() > 0
    assert DRA(threat=THREAT, candidates=tiny_candidates(), steps=2, step_size=0.0)(model, batch).distance.max() > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"samples": 0}, "samples"),
        ({"choice": "sample"}, "choice"),
        ({"text_weights": (0.6, 0.4)}, "text_weights"),
        ({"text_weights": (0.6, -0.2, 0.2)}, "text_weights"),
        ({"text_weights": (0.6, float("nan"), 0.2)}, "text_weights"),
        ({"text_weights": (0, 0, 0)}, "text_weights"),
        ({"steps": 0}, "steps"),
        ({"step_size": -1.0}, "step_size"),
    ],
)
def test_bad_arguments_are_named(arguments, named: str) -> None:
    with pytest.raises(UserError, match=named):
        DRA(threat=THREAT, candidates=tiny_candidates(), **arguments)


def test_the_models_are_left_as_they_were() -> None:
    model, batch = tiny_clip(seed=2).train(), words_batch((1, 1))
    DRA(threat=THREAT, candidates=tiny_candidates(), steps=2)(model, batch)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
