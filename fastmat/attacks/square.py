"""Square (Andriushchenko et al., ECCV 2020): a random search that asks the model for values, never for gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.margin import Margin
from fastmat.attacks.objectives import Contrastive, Objective
from fastmat.errors import UserError
from fastmat.models.protocol import ImageState, VisionLanguageModel
from fastmat.ops import project
from fastmat.types import AttackContext, Batch, ThreatModel

HALVINGS = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries, as the paper has them


class Square(Attack):
    """Image only, black box: each query changes one random square and is kept where it raises the objective.

    Defaults: 5000 queries and p_init 0.8, AutoAttack's for hardened models (Croce and Hein, ICML 2020); the paper's
    p_init is 0.05 (Linf) and 0.1 (L2), for undefended ones.

    objective: what is raised; only its values are used. Default: `Contrastive`, this project's choice; the published
        loss, carried over to retrieval, is `Margin`.
    n_queries: images that the model is asked about per sample, the start included.
    p_init: share of the pixels in the first squares, in (0, 1]; it halves after `HALVINGS`, rescaled to `n_queries`.
    stop_when_lost: a sample is asked no further once a wrong caption of the context stands before all right ones
        (`Margin` positive), as published; off by default, since other models and larger galleries judge the image too.
        One host sync per query.

    Linf: vertical stripes of +-eps per channel at the start, then squares of +-eps per channel (algorithm 2). L2: a
    tiling of bumps at the start, then a bump in one window that takes over the norm of another (algorithm 3). Every
    sample draws its own places and signs (AutoAttack: one square for all), at any place inside the image (both
    releases: never the last), and a draw that changes nothing is a query spent (the authors' release draws again; the
    paper does not). The releases also halve p at 500.

    queries: [B] int64, how often the last call asked the model about each sample; None before. Clean images that an
        objective or the default context encodes are not counted.

    Raises UserError without a query or with p_init outside (0, 1].
    """

    per_image = ("queries",)

    def __init__(
        self,
        *,
        threat: ThreatModel,
        objective: Objective | None = None,
        n_queries: int = 5000,
        p_init: float = 0.8,
        stop_when_lost: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        if n_queries < 1:
            raise UserError(f"n_queries must be at least 1, got {n_queries}")
        if not 0 < p_init <= 1:
            raise UserError(f"p_init must be a share of the pixels in (0, 1], got {p_init}")
        self.objective = objective or Contrastive()
        self.n_queries = n_queries
        self.p_init = p_init
        self.stop_when_lost = stop_when_lost
        self.queries: Tensor | None = None

    @torch.no_grad()
    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        x0, threat = batch.images, self.threat
        self.queries = torch.zeros_like(batch.index)
        if threat.eps == 0:
            return x0, batch.texts
        start, propose = (stripes, repaint) if threat.norm == "linf" else (bumps, move_norm)
        value = self.objective.bind(model, batch, context)
        margin = Margin().bind(model, batch, context) if self.stop_when_lost else None

        x = start(x0, threat, draws, batch.index)
        state = model.encode_image(x)
        best = value(state)
        self.queries += 1
        asked = torch.arange(len(x), device=x.device)
        if margin is not None:
            asked = asked[margin(state) <= 0]
        for query in range(1, self.n_queries):
            if not len(asked):
                break
            side = square_side(query - 1, self.n_queries, self.p_init, x.shape[2:])
            u = draws.uniform(f"square/{query}", batch.index[asked], (5 + x.shape[1],))
            candidate = propose(x[asked], x0[asked], side, threat, u)
            state = put(state, asked, model.encode_image(candidate))
            self.queries[asked] += 1
            new = value(state)[asked]
            better = new > best[asked]
            if margin is not None:
                lost = margin(state)[asked] > 0
                better = better | lost
            x[asked] = torch.where(better[:, None, None, None], candidate, x[asked])
            best[asked] = torch.where(better, new, best[asked])
            if margin is not None:
                asked = asked[~lost]
        return x, batch.texts


def square_side(done: int, n_queries: int, p_init: float, sides: Sequence[int]) -> int:
    """Side of the next square in an image of `sides` (H, W) when `done` squares of `n_queries` have been tried.

    >>> [square_side(done, 10_000, 0.8, (224, 224)) for done in (0, 11, 51, 9999)]
    [200, 142, 100, 13]
    """
    passed = sum(10_000 * done // n_queries > halving for halving in HALVINGS)
    return min(max(round(math.sqrt(p_init / 2**passed * sides[0] * sides[1])), 1), *sides)


def stripes(x0: Tensor, threat: ThreatModel, draws: Draws, index: Tensor) -> Tensor:
    """The Linf start: every column of every channel moved by +-eps."""
    sign = signs(draws.uniform("square/start", index, (x0.shape[1], x0.shape[3])))
    return (x0 + threat.eps * sign[:, :, None]).clamp(*threat.bounds)


def repaint(x: Tensor, x0: Tensor, side: int, threat: ThreatModel, u: Tensor) -> Tensor:
    """The Linf candidate: one square of x moved to x0 +- eps, a sign per channel. u: [B, 5 + C] in (-1, 1)."""
    inside = covered(places(u[:, :2], side, x), side, x)
    return torch.where(inside, (x0 + threat.eps * signs(u[:, 5:, None, None])).clamp(*threat.bounds), x)


def bumps(x0: Tensor, threat: ThreatModel, draws: Draws, index: Tensor) -> Tensor:
    """The L2 start: tiles of a fifth of the shorter side, each a bump with a sign per channel, at norm eps."""
    channels, height, width = x0.shape[1:]
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    u = draws.uniform("square/start", index, (down, across, 1 + channels))
    tiles = bump(side, u[..., 0])[..., None, :, :] * signs(u[..., 1:, None, None])  # [B, down, across, C, side, side]
    tiled = tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(x0), channels, down * side, across * side)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    delta = torch.zeros_like(x0)
    delta[:, :, top : top + down * side, left : left + across * side] = tiled
    length = delta.square().sum((1, 2, 3), keepdim=True).sqrt()
    return project(x0 + threat.eps * delta / length, x0, eps=threat.eps, norm="l2", bounds=threat.bounds)


def move_norm(x: Tensor, x0: Tensor, side: int, threat: ThreatModel, u: Tensor) -> Tensor:
    """The L2 candidate: a bump joins window 1, which takes over window 2's norm and any unspent. u: [B, 5 + C]."""
    side = min(max(side, 3) | 1, *x.shape[2:])
    one, two = places(u[:, :2], side, x), places(u[:, 2:4], side, x)
    inside, first = covered(one, side, x) | covered(two, side, x), window(one, side, x)
    delta = x - x0
    unspent = (threat.eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0)
    available = delta.square().where(inside, 0.0).sum((2, 3), keepdim=True) + unspent / x.shape[1]
    direction = unit(bump(side, u[:, 4])[:, None] * signs(u[:, 5:, None, None]) + unit(delta[first]))
    delta = delta.masked_fill(inside, 0.0)
    delta[first] = direction * available.sqrt()
    return project(x0 + delta, x0, eps=threat.eps, norm="l2", bounds=threat.bounds)


def bump(side: int, u: Tensor) -> Tensor:
    """[*u.shape, side, side] of unit norm: two opposite pyramids on the halves of a square, top and bottom where u is
    negative, left and right elsewhere (the paper's eta)."""
    upper = pyramid(side // 2, side, u.device)
    upright = unit(torch.cat([upper, -pyramid(side - side // 2, side, u.device)]))
    return torch.where((u < 0)[..., None, None], upright, upright.T)


def pyramid(height: int, width: int, device: torch.device) -> Tensor:
    """[height, width] of unit norm: at distance d (maximum norm) from the centre the sum of 1 / k^2 over k > d."""
    levels = max(height, width) // 2 + 1
    steps = torch.arange(1, levels + 1, device=device).float().pow(-2)
    rows, columns = ((torch.arange(n, device=device) - n // 2).abs() for n in (height, width))
    return unit(steps.flip(0).cumsum(0).flip(0)[torch.maximum(rows[:, None], columns)])


def unit(x: Tensor) -> Tensor:
    """x with its last two dimensions at norm 1, or 0 where it is 0."""
    return x / x.square().sum((-2, -1), keepdim=True).sqrt().clamp_min(1e-10)


def places(u: Tensor, side: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """u [B, 2] in (-1, 1) to the top and left [B] of a square that lies anywhere inside x [B, C, H, W]."""
    top, left = (
        ((u[:, i] + 1) / 2 * (length - side + 1)).long().clamp_max(length - side)  # rounding may reach the end
        for i, length in enumerate(x.shape[2:])
    )
    return top, left


def covered(corner: tuple[Tensor, Tensor], side: int, x: Tensor) -> Tensor:
    """[B, 1, H, W] bool, True inside the square of each image in x [B, C, H, W]."""
    rows, columns = (
        (start[:, None] <= place) & (place < start[:, None] + side)
        for start, place in zip(corner, (torch.arange(n, device=x.device) for n in x.shape[2:]), strict=True)
    )
    return rows[:, None, :, None] & columns[:, None, None, :]


def window(corner: tuple[Tensor, Tensor], side: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The index of the same squares; `x[window]` is [B, C, side, side]."""
    image, channel, offset = (torch.arange(n, device=x.device) for n in (len(x), x.shape[1], side))
    rows, columns = (start[:, None] + offset for start in corner)
    return image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]


def signs(u: Tensor) -> Tensor:
    """u in (-1, 1) to -1 or 1."""
    return torch.where(u < 0, -1.0, 1.0)


def put(old: ImageState, rows: Tensor, new: ImageState) -> ImageState:
    """`old` with `rows` replaced by `new`."""
    if len(new.features) == len(old.features):
        return new
    tokens = None if old.tokens is None or new.tokens is None else old.tokens.index_copy(0, rows, new.tokens)
    return ImageState(
        tokens=tokens,
        embeds=old.embeds.index_copy(0, rows, new.embeds),
        features=old.features.index_copy(0, rows, new.features),
    )
