"""Square against a plain loop over samples, and what it promises: no gradients, counted queries, both budgets."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import random_batch

from fastmat.attacks.base import context_of
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.margin import Margin
from fastmat.attacks.objectives import Contrastive, CosineToOwn, KLFromClean
from fastmat.attacks.square import Square, bump, bumps, move_norm, repaint, square_side, stripes
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.types import ThreatModel

LINF, L2 = ThreatModel(eps=16 / 255), ThreatModel(eps=2.0, norm="l2")
BOTH = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])


def value_of(model, objective, batch, images, context) -> torch.Tensor:
    with torch.no_grad():
        return objective.bind(model, batch, context)(model.encode_image(images))


# The published loop, one image at a time in float64; places and signs are the attack's own draws.


def choose(u: float, count: int) -> int:
    return min(int((u + 1) / 2 * count), count - 1)


def sign(u: np.ndarray) -> np.ndarray:
    return np.where(u < 0, -1.0, 1.0)


def half_bump(height: int, width: int) -> np.ndarray:
    """Boxes growing around the centre, the k-th adds 1 / k^2."""
    out = np.zeros((height, width))
    for k in range(1, max(height, width) // 2 + 2):
        for r in range(height):
            for c in range(width):
                if abs(r - height // 2) < k and abs(c - width // 2) < k:
                    out[r, c] += 1 / k**2
    return out / np.linalg.norm(out)


def whole_bump(side: int, u: float) -> np.ndarray:
    out = np.concatenate([half_bump(side // 2, side), -half_bump(side - side // 2, side)])
    return (out if u < 0 else out.T) / np.linalg.norm(out)


def fraction(i: int, n: int) -> float:
    milestones = {10: 2, 50: 4, 200: 8, 1000: 16, 2000: 32, 4000: 64, 6000: 128, 8000: 256}
    return 0.8 / max([1, *(by for milestone, by in milestones.items() if i * 10000 // n > milestone)])


def plain_square(ask, x0: np.ndarray, index: int, threat: ThreatModel, n_queries: int, seed: int) -> np.ndarray:
    c, h, w = x0.shape
    draws, key, eps = SeededDraws(seed), torch.tensor([index]), threat.eps

    def draw(name: str, *shape: int) -> np.ndarray:
        return draws.uniform(name, key, shape)[0].double().numpy()

    if threat.norm == "linf":
        best = np.clip(x0 + eps * sign(draw("square/start", c, w))[:, None, :], 0, 1)
    else:
        tile = h // 5
        u, delta = draw("square/start", h // tile, w // tile, 1 + c), np.zeros_like(x0)
        for i in range(h // tile):
            for j in range(w // tile):
                top, left = (h - 5 * tile) // 2 + i * tile, (w - 5 * tile) // 2 + j * tile
                for k in range(c):
                    delta[k, top : top + tile, left : left + tile] = whole_bump(tile, u[i, j, 0]) * sign(u[i, j, 1 + k])
        best = np.clip(x0 + eps * delta / np.linalg.norm(delta), 0, 1)
    record = ask(best)
    for i in range(n_queries - 1):
        u = draw(f"square/{i + 1}", 5 + c)
        s = max(1, round(math.sqrt(fraction(i, n_queries) * h * w)))
        if threat.norm == "linf":
            r, q = choose(u[0], h - s + 1), choose(u[1], w - s + 1)
            delta = best - x0
            for k in range(c):
                delta[k, r : r + s, q : q + s] = eps * sign(u[5 + k])
        else:
            s = max(s, 3)
            s += s % 2 == 0
            r, q = choose(u[0], h - s + 1), choose(u[1], w - s + 1)
            r2, q2 = choose(u[2], h - s + 1), choose(u[3], w - s + 1)
            old = best - x0
            union = np.zeros((h, w), dtype=bool)
            union[r : r + s, q : q + s] = union[r2 : r2 + s, q2 : q2 + s] = True
            delta = old.copy()
            delta[:, union] = 0
            for k in range(c):
                own = old[k, r : r + s, q : q + s]
                mix = whole_bump(s, u[4]) * sign(u[5 + k]) + own / max(np.linalg.norm(own), 1e-10)
                norm2 = (old[k][union] ** 2).sum() + max(eps**2 - (old**2).sum(), 0) / c
                delta[k, r : r + s, q : q + s] = mix / np.linalg.norm(mix) * math.sqrt(norm2)
            delta *= eps / np.linalg.norm(delta)
        candidate = np.clip(x0 + delta, 0, 1)
        value = ask(candidate)
        if value > record:
            best, record = candidate, value
    return best


@BOTH
def test_same_images_as_a_plain_loop(threat) -> None:
    model, batch = tiny_clip().eval(), random_batch((2, 1))
    context = context_of(model, batch)
    result = Square(threat=threat, n_queries=40, seed=3)(model, batch, context)
    for i in range(2):
        one = batch.rows(i, i + 1)

        def ask(image: np.ndarray, one=one) -> float:
            images = torch.from_numpy(image).float()[None]
            return float(value_of(model, Contrastive(), one, images, context))

        want = plain_square(ask, one.images[0].double().numpy(), int(one.index), threat, 40, seed=3)
        np.testing.assert_allclose(result.images[i].numpy(), want, atol=1e-5)


@BOTH
@pytest.mark.parametrize(
    "objective", [Contrastive(), Margin(), CosineToOwn(), KLFromClean()], ids=lambda o: type(o).__name__
)
def test_queries_pay_and_the_budget_holds(threat, objective) -> None:
    model, batch = tiny_clip().eval(), random_batch()
    context = context_of(model, batch)
    values = []
    for n_queries in (1, 15, 60):
        attack = Square(threat=threat, objective=objective, n_queries=n_queries)
        result = attack(model, batch, context)
        assert (result.distance <= threat.eps + 1e-6).all() and (result.distance > 0.6 * threat.eps).all()
        assert result.images.min() >= 0 and result.images.max() <= 1 and result.images.dtype == torch.float32
        assert result.texts == batch.texts
        assert torch.equal(attack.queries, torch.full((4,), n_queries))
        values.append(value_of(model, objective, batch, result.images, context).mean())
    assert values[0] < values[1] < values[2]
    assert values[2] > value_of(model, objective, batch, batch.images, context).mean()


@BOTH
def test_splitting_a_batch_changes_nothing(threat) -> None:
    model, batch = tiny_clip().eval(), random_batch((2, 1, 3, 2, 1))
    context = context_of(model, batch)
    attack = Square(threat=threat, n_queries=30)
    whole = attack(model, batch, context).images
    parts = [attack(model, batch.rows(a, b), context).images for a, b in ((0, 2), (2, 3), (3, 5))]
    torch.testing.assert_close(whole, torch.cat(parts), atol=1e-6, rtol=0)
    same_index = replace(batch, index=batch.index + 1)
    assert not torch.equal(attack(model, same_index, context).images, whole)


class Detached:
    """An image tower that gives values only, and keeps count of the images it is shown."""

    def __init__(self, encode_image) -> None:
        self.encode_image = encode_image
        self.shown = 0

    def __call__(self, images: torch.Tensor):
        assert not torch.is_grad_enabled() and not images.requires_grad
        self.shown += len(images)
        state = self.encode_image(images)
        return state._replace(tokens=None, embeds=state.embeds.detach(), features=state.features.detach())


@BOTH
@pytest.mark.parametrize("stop_when_lost", [False, True])
def test_no_gradient_is_ever_asked_for_and_every_query_is_counted(threat, stop_when_lost, monkeypatch) -> None:
    model, batch = tiny_clip().eval(), random_batch((1,) * 6)
    context = context_of(model, batch)
    tower = model.encode_image = Detached(model.encode_image)

    def refuse(*args, **kwargs):
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    attack = Square(threat=threat, n_queries=40, stop_when_lost=stop_when_lost)
    assert attack.queries is None
    with torch.enable_grad():
        result = attack(model, batch, context)
    assert not result.images.requires_grad
    assert attack.queries.dtype == torch.int64 and int(attack.queries.sum()) == tower.shown
    assert (tower.shown < 6 * 40) == stop_when_lost


@BOTH
def test_lost_samples_are_asked_no_further(threat) -> None:
    model, batch = tiny_clip().eval(), random_batch((1,) * 12)
    threat = replace(threat, eps=8 / 255) if threat.norm == "linf" else threat
    context = context_of(model, batch)
    image = context.image_features  # each text stands between two images, so that some fall early, some late, some not
    text = image.lerp(image.roll(-1, 0), torch.linspace(0.45, 0.5, 12)[:, None])
    context = replace(context, text_features=torch.nn.functional.normalize(text, dim=1))
    attack = Square(threat=threat, n_queries=60, stop_when_lost=True)
    result = attack(model, batch, context)
    queries = attack.queries
    lost = value_of(model, Margin(), batch, result.images, context) > 0
    assert torch.equal(queries < 60, lost) and queries.min() == 1 and len(queries.unique()) > 5 and not lost.all()
    for i in (0, 5, 9):
        alone = attack(model, batch.rows(i, i + 1), context)
        torch.testing.assert_close(alone.images, result.images[i : i + 1], atol=1e-6, rtol=0)
        assert int(attack.queries) == int(queries[i])


def test_schedule_of_the_paper_rescaled() -> None:
    sides = [square_side(i, 10_000, 1.0, (512, 512)) for i in (0, 10, 11, 51, 201, 1001, 2001, 4001, 6001, 8001)]
    assert sides == [512, 512, 362, 256, 181, 128, 91, 64, 45, 32]
    for i in (0, 10, 11, 700, 5000, 9998):
        assert square_side(i // 5, 2000, 0.8, (64, 64)) == square_side(i // 5 * 5, 10_000, 0.8, (64, 64))
    assert square_side(0, 10, 1.0, (8, 50)) == 8 and square_side(9_999, 10_000, 1e-6, (8, 8)) == 1


@pytest.mark.parametrize("side", [1, 2, 3, 6, 13])
def test_bump(side) -> None:
    got = bump(side, torch.tensor([-0.5, 0.5]))
    if side > 1:
        np.testing.assert_allclose(got[0].numpy(), whole_bump(side, -1), atol=1e-6)
    assert torch.equal(got[0].T, got[1]) and torch.allclose(got.square().sum((1, 2)), torch.ones(2))


def test_squares_reach_every_place_and_draw_both_signs() -> None:
    model, batch = tiny_clip().eval(), random_batch((1,) * 60, size=6)
    batch = batch.replace(images=torch.full_like(batch.images, 0.5))
    start = Square(threat=LINF, n_queries=1)(model, batch).images - 0.5
    assert torch.allclose(start.abs(), torch.tensor(16 / 255)) and torch.equal(start[:, :, 0], start[:, :, 5])
    assert (start > 0).float().mean() == pytest.approx(0.5, abs=0.1)
    objective = type("Any", (), {"bind": lambda *_: Rising()})()
    moved = Square(threat=LINF, n_queries=2, p_init=1 / 36, objective=objective)(model, batch).images - 0.5 - start
    changed = moved.abs().sum(1) > 1e-6
    assert (changed.sum((1, 2)) <= 1).all() and changed.any(0).sum() > 20
    assert changed[:, 5].any() and changed[:, :, 5].any() and changed[:, 0].any() and changed[:, :, 0].any()


class Rising:
    """Accepts every candidate."""

    calls = 0

    def __call__(self, state) -> torch.Tensor:
        self.calls += 1
        return torch.full((len(state.features),), float(self.calls))


@BOTH
@pytest.mark.parametrize(("height", "width"), [(32, 48), (7, 7), (3, 5), (1, 1)])
def test_any_shape_of_image_stays_in_the_ball(threat, height, width) -> None:
    model, batch = tiny_clip().eval(), random_batch()
    batch = batch.replace(images=torch.rand(4, 3, height, width))
    result = Square(threat=threat, n_queries=12)(model, batch)
    assert result.images.shape == batch.images.shape and (result.distance > 0).any()


@BOTH
def test_nothing_to_spend(threat) -> None:
    attack, batch = Square(threat=replace(threat, eps=0.0)), random_batch()
    assert torch.equal(attack(tiny_clip(), batch).images, batch.images) and not attack.queries.any()


def test_defaults_and_bad_settings() -> None:
    attack = Square(threat=LINF)
    assert (attack.n_queries, attack.p_init, attack.stop_when_lost) == (5000, 0.8, False)
    assert isinstance(attack.objective, Contrastive)
    for settings, reason in [
        ({"n_queries": 0}, "n_queries must be at least 1, got 0"),
        ({"p_init": 0.0}, "p_init must be .* got 0.0"),
        ({"p_init": 1.5}, "p_init must be .* got 1.5"),
        ({"p_init": math.nan}, "p_init must be .* got nan"),
    ]:
        with pytest.raises(UserError, match=reason):
            Square(threat=LINF, **settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_candidates_wait_for_nothing_on_a_gpu() -> None:
    x0, index = torch.rand(4, 3, 32, 32, device="cuda"), torch.arange(4, device="cuda")
    draws = SeededDraws(0)
    for side in (20, 3):
        for threat, start, propose in ((LINF, stripes, repaint), (L2, bumps, move_norm)):
            torch.cuda.set_sync_debug_mode("error")
            try:
                propose(start(x0, threat, draws, index), x0, side, threat, draws.uniform("u", index, (8,)))
            finally:
                torch.cuda.set_sync_debug_mode("default")
