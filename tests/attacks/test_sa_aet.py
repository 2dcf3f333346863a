"""SA-AET against a plain restatement of the published loop; projector and sampler against the published ones."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from batches import random_batch
from oracles.three_guides import plain_texts
from tiny_mlm import tiny_candidates, tiny_captions
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from fastmat.attacks.base import context_of, text_features
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.sa_aet import SAAET, projector, triangle_weights
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.types import AttackContext, Batch, ThreatModel

THREAT = ThreatModel(eps=32 / 255, max_words=1)  # far enough for the moved images to choose other words
OFFICIAL = SAAET.official.but(round_trip=False, text_max_length=30)
SCALES = (0.5, 0.75, 1.25, 1.5)
STEPS, STEP_SIZE, SAMPLES = 4, THREAT.eps / 4, 5


def words_batch(captions: tuple[int, ...] = (2, 1, 3)) -> Batch:
    batch = random_batch(captions)
    return batch.replace(texts=tuple(tiny_captions(sum(captions), seed=3)))


def gallery(model, batch: Batch, captions: int = 50) -> AttackContext:
    """The batch's own context with the texts of a larger set."""
    features = text_features(model, tiny_captions(captions, seed=8))
    return replace(context_of(model, batch), text_features=features, text_group=torch.arange(captions))


def attack_of(**arguments) -> SAAET:
    return SAAET(threat=THREAT, candidates=tiny_candidates(), steps=STEPS, **arguments)


def published_chances() -> dict[tuple[int, int, int], Fraction]:
    """Every (current, clean, previous) in percent, by walking through all draws that the published sampler keeps."""
    kept: Counter[tuple[int, int, int]] = Counter()
    for current in range(1, 101):
        pairs = [(current, clean) for clean in range(1, 101 - current)] if 100 - current > 1 else [(98, 1)]
        for a, b in pairs:
            c = 100 - a - b
            if 1 <= c <= 100 and a < c < b:
                kept[a, b, c] += Fraction(1, 100 * len(pairs))
    total = sum(kept.values())
    return {triple: chance / total for triple, chance in kept.items()}


def plain_weights(u: float, v: float, chances: dict[tuple[int, int, int], Fraction]) -> list[float]:
    """The current image's percent by its distribution function at u in [0, 1], the clean one's at v among the rest."""
    reached = 0.0
    for current in range(1, 33):
        of_it = sorted(triple for triple in chances if triple[0] == current)
        reached += float(sum(chances[triple] for triple in of_it))
        if u <= reached:
            break
    return [percent / 100 for percent in of_it[int(v * len(of_it))]]


def published_plane(corpus: Tensor) -> Tensor:
    """All left singular vectors of the features as columns, but the first."""
    vectors = torch.svd(corpus.T)[0]
    return vectors[:, 1:] @ vectors[:, 1:].T


def published_images(
    model, batch: Batch, targets: Tensor, corpus: Tensor, *, antialias: bool, draws: SeededDraws, shared: bool
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Final and last but one iterate, the corpus decomposed at every loss; and what was chosen, per step and image."""
    chances, x0, eps, count = published_chances(), batch.images, THREAT.eps, len(batch)

    def loss(images: Tensor) -> Tensor:
        plane = published_plane(corpus)
        similarity = (model.encode_image(images).features @ plane) @ (targets @ plane).T
        labels = torch.zeros_like(similarity)
        for t, i in enumerate(batch.txt2img.tolist()):
            labels[i, t] = 1
        return -(similarity * labels).sum(-1)

    def gradient(images: Tensor, step: int | None) -> Tensor:
        live = images.detach().requires_grad_(True)
        total = loss(live).mean()
        for k, scale in enumerate(SCALES if step is not None else ()):
            noise = 0.05 * draws.normal(f"scale/{step}/{k}", batch.index, x0.shape[1:])
            down = resize(live + noise, [int(32 * scale)] * 2, InterpolationMode.BICUBIC, antialias=antialias)
            back = resize(down.clamp(0, 1), [32, 32], InterpolationMode.BICUBIC, antialias=antialias)
            total = total + loss(back).mean()
        total.backward()
        return live.grad / live.grad.abs().mean(dim=(1, 2, 3), keepdim=True)

    def moved(x: Tensor, point: Tensor, step: int | None) -> Tensor:
        there = x + STEP_SIZE * gradient(point, step).sign()
        return torch.min(torch.max(there, x0 - eps), x0 + eps).clamp(0, 1)

    x = (x0 + eps * draws.uniform("start", batch.index, x0.shape[1:])).clamp(0, 1)
    last, choices = x, []
    for step in range(STEPS):
        point = x
        if step > 0:
            index = batch.index[:1].expand(count) if shared else batch.index
            unit = (draws.uniform(f"mixture/{step}", index, (SAMPLES, 2)) + 1) / 2
            points, harms = [], []
            for k in range(SAMPLES):
                rows = []
                for i in range(count):
                    current, clean, previous = plain_weights(*unit[i, k].tolist(), chances)
                    rows.append(current * x[i] + clean * x0[i] + previous * last[i])
                points.append(torch.stack(rows))
                harms.append(loss(moved(x, points[k], None)).detach())
            table = torch.stack(harms)
            best = [int(table.mean(1).argmax())] * count if shared else table.argmax(0).tolist()
            choices.append(best)
            point = torch.stack([points[k][i] for i, k in enumerate(best)])
        x, last = moved(x, point, step), x
    return x, last, choices


@pytest.mark.parametrize("choice", ["image", "batch"])
@pytest.mark.parametrize("quirks", [Quirks(), OFFICIAL], ids=["correct", "official"])
def test_sa_aet_equals_the_published_loop(quirks: Quirks, choice) -> None:
    model, batch = tiny_clip(seed=2).eval().requires_grad_(False), words_batch()
    context, x0 = gallery(model, batch), batch.images
    result = attack_of(choice=choice, quirks=quirks, seed=5)(model, batch, context)
    first = plain_texts(model, batch, [(1.0, x0), (0.0, x0), (0.0, x0)], quirks)
    with torch.no_grad():
        rows = [model.encode_text(model.tokenize([text], max_length=quirks.text_max_length)).features for text in first]
    order = SeededDraws(5).uniform("corpus", torch.arange(50), ()).tolist()
    corpus = [row for _, row in sorted(zip(order, range(50), strict=True))][:20]
    images, last, choices = published_images(
        model,
        batch,
        torch.cat(rows),
        context.text_features[corpus],
        antialias=quirks.antialias,
        draws=SeededDraws(5),
        shared=choice == "batch",
    )
    # One gradient near zero may round to the other sign, and moves its neighbours in the steps after.
    assert ((result.images - images).abs() > 1e-5).float().mean() <= 0.01
    assert list(result.texts) == plain_texts(model, batch, [(0.6, x0), (0.2, images), (0.2, last)], quirks)
    assert first != list(batch.texts)
    assert len({k for step in choices for k in step}) > 1
    assert (choice == "image") == any(len(set(step)) > 1 for step in choices)


@pytest.mark.parametrize("captions", [2, 7, 16, 17, 100])
def test_the_projector_is_the_published_one(captions: int) -> None:
    """With fewer captions than the 16 dimensions, as many, and more."""
    corpus = torch.nn.functional.normalize(torch.randn(captions, 16, generator=torch.Generator().manual_seed(1)) + 0.5)
    plane = projector(corpus)
    torch.testing.assert_close(plane, published_plane(corpus.double()).float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(plane @ plane, plane, atol=1e-5, rtol=0)
    assert round(float(plane.trace())) == min(captions, 16) - 1


@pytest.mark.parametrize("copies", [2, 5])
def test_repeated_captions_bring_no_direction(copies: int) -> None:
    """Six directions in 16 dimensions, with twelve captions and with more than dimensions."""
    corpus = torch.nn.functional.normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(1)) + 0.5)
    torch.testing.assert_close(projector(corpus.repeat(copies, 1)), projector(corpus), atol=1e-5, rtol=0)


def test_the_sampler_is_the_published_one() -> None:
    chances = published_chances()
    lattice = (torch.arange(1500, dtype=torch.float64) + 0.5) / 1500 * 2 - 1
    draw = torch.cartesian_prod(lattice, lattice).float()
    weights = triangle_weights(draw)
    assert (weights.sum(1) - 1).abs().max() < 1e-6
    assert (weights[:, 0] < weights[:, 2]).all() and (weights[:, 2] < weights[:, 1]).all()
    found = torch.zeros(101, 101)
    percent = (weights * 100).round().long()
    found.index_put_((percent[:, 0], percent[:, 1]), torch.ones(()), accumulate=True)
    expected = torch.zeros(101, 101)
    for (current, clean, _), chance in chances.items():
        expected[current, clean] = float(chance)
    torch.testing.assert_close(found.sum(1) / len(draw), expected.sum(1), atol=1e-3, rtol=0)
    assert (found / len(draw) - expected).abs().sum() < 0.06  # the lattice's own coarseness
    ends = triangle_weights(torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]))
    assert ends.mul(100).round().int().tolist() == [[1, 50, 49], [1, 97, 2], [32, 35, 33], [32, 35, 33]]


def test_one_decomposition_for_one_context(monkeypatch) -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch()
    decompose, calls = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(a[0].shape) or decompose(*a, **k))
    attack, context = attack_of(), gallery(model, batch)
    attack(model, batch, context)
    attack(model, batch.rows(1, 3), context)
    assert calls == [(20, 16)]
    attack(model, batch, gallery(model, batch, captions=60))
    assert calls == [(20, 16), (24, 16)]


def test_the_corpus_is_chosen_by_the_seed() -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch()
    features = gallery(model, batch).text_features
    planes = [attack_of(seed=seed).projector_of(features) for seed in (0, 0, 1)]
    assert torch.equal(planes[0], planes[1])
    whole = attack_of(share=1.0).projector_of(features)
    torch.testing.assert_close(whole, projector(features), atol=1e-6, rtol=0)
    assert (planes[0] - planes[2]).abs().max() > 1e-3 < (planes[0] - whole).abs().max()


def test_splitting_a_batch_changes_nothing() -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch((2, 1, 3, 2))
    attack, context = attack_of(), gallery(model, batch)
    whole, again = attack(model, batch, context), attack(model, batch, context)
    assert torch.equal(whole.images, again.images) and whole.texts == again.texts
    parts = [attack(model, batch.rows(a, b), context) for a, b in ((0, 1), (1, 4))]
    # Batched convolutions round differently.
    assert ((whole.images - torch.cat([part.images for part in parts])).abs() > 1e-5).float().mean() <= 0.01
    assert whole.texts == sum((part.texts for part in parts), ())


def test_the_published_choice_depends_on_the_batch() -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch((2, 1, 3, 2))
    attack, context = attack_of(choice="batch"), gallery(model, batch)
    assert not attack.splits and attack_of().splits
    whole, alone = attack(model, batch, context).images, attack(model, batch.rows(3, 4), context).images
    assert ((whole[3:] - alone).abs() > 1e-5).float().mean() > 0.05


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_both_budgets_hold_and_the_projected_similarity_falls(norm) -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch()
    threat = ThreatModel(eps=8 / 255 if norm == "linf" else 1.0, norm=norm, max_words=1)
    attack, context = SAAET(threat=threat, candidates=tiny_candidates()), gallery(model, batch)
    result = attack(model, batch, context)
    assert result.distance.max() <= threat.eps + 1e-6 and result.distance.min() > 0.5 * threat.eps
    assert result.images.min() >= 0 and result.images.max() <= 1
    assert result.words_changed.max() == 1
    plane = attack.projector_of(context.text_features)

    def similarity(images: Tensor, texts: tuple[str, ...]) -> Tensor:
        with torch.no_grad():
            features = model.encode_image(images).features[batch.txt2img]
        return (features @ plane * attack.dra.sga.words.features(model, texts)).sum(1)

    first = attack.dra.sga.words
    plan = first.plan(model, batch.texts)
    texts = first.search(model, plan, context.image_features[batch.txt2img])
    assert (similarity(result.images, texts) < similarity(batch.images, texts)).all()


def test_few_captions_are_enough_until_nothing_is_left() -> None:
    model, batch = tiny_clip(seed=2).eval(), random_batch((1, 1, 1))
    assert attack_of()(model, batch).distance.max() > 0  # 40 % of three is one caption; two are taken
    with pytest.raises(UserError, match="1 caption of the context"):
        attack_of()(model, batch.rows(0, 1))
    same = batch.replace(texts=("a red dog",) * 3)
    with pytest.raises(UserError, match="2 captions of the context"):
        attack_of()(model, same)
    words_alone = SAAET(threat=ThreatModel(eps=0, max_words=1), candidates=tiny_candidates())
    assert torch.equal(words_alone(model, batch.rows(0, 1)).images, batch.images[:1])


def test_one_step_and_one_sample_run() -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch()
    context = gallery(model, batch)
    for arguments in ({"steps": 1}, {"steps": 2, "samples": 1, "scales": ()}, {"steps": 2, "samples": 7, "scales": ()}):
        attack = SAAET(threat=THREAT, candidates=tiny_candidates(), **arguments)
        assert attack(model, batch, context).distance.max() > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"share": 0.0}, "share"),
        ({"share": 1.5}, "share"),
        ({"share": float("nan")}, "share"),
        ({"samples": 0}, "samples"),
        ({"choice": "sample"}, "choice"),
        ({"text_weights": (0.6, 0.4)}, "text_weights"),
        ({"step_size": -1.0}, "step_size"),
    ],
)
def test_bad_arguments_are_named(arguments, named: str) -> None:
    with pytest.raises(UserError, match=named):
        attack_of(**arguments)


def test_the_models_are_left_as_they_were() -> None:
    model, batch = tiny_clip(seed=2).train(), words_batch((1, 1))
    attack_of()(model, batch, gallery(model, batch))
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
