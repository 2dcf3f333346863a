"""DRA: SGA whose gradient is taken off the trajectory (Gao et al., ECCV 2024, arXiv 2403.12445).

Constants and order follow the authors' code, SensenGao/VLPTransferAttack, RAttacker.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastmat import ops
from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.objectives import Bound
from fastmat.attacks.search import random_start
from fastmat.attacks.sga import SGA
from fastmat.attacks.word_substitution import TextPlan
from fastmat.errors import UserError
from fastmat.models.protocol import ImageState, VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.text.candidates import CandidateSource
from fastmat.types import AttackContext, Batch, ThreatModel

Choice = Literal["image", "batch"]


@dataclass(frozen=True, kw_only=True)
class Search:
    """What the attacks that search for their gradient around the trajectory differ in.

    away: given model, batch and the plan of its former texts, what the image ascends.
    mix: weights [..., 3] of current, clean and previous image from draws [..., 2], uniform in (-1, 1).
    project_trials: whether the step that judges a mixture ends inside ball and box.
    """

    away: Callable[[VisionLanguageModel, Batch, TextPlan], Bound]
    mix: Callable[[Tensor], Tensor]
    project_trials: bool


class DRA(Attack):
    """Diversification along the intersection region of the adversarial trajectory.

    Text, image, text as in SGA, with two changes. From the second step on the image's gradient, over all scales, is
    taken at a random mixture of the current iterate, the clean image and the previous iterate: of `samples` mixtures
    the one whose own gradient, followed for one step from the current iterate, harms most (no scales here, and the
    trial is not projected). The step itself starts at the current iterate. The last text pass moves away from the
    clean image, the final and the last but one iterate, weighted by `text_weights`.

    steps 10, step_size eps/4, samples 5, text_weights (0.6, 0.2, 0.2): the published code, at eps 8/255. scales,
    noise_std, candidates, beam: as in SGA.
    choice: "image" draws and chooses mixtures for every image on its own. "batch" is the published form: one set of
        mixtures for the whole batch, chosen by the batch's mean, so that the result depends on how a batch is split.
    Raises UserError without a step or a sample, with a negative step size, or with unusable text weights.
    """

    official = Quirks.official().but(mid_max_length=None)

    def __init__(
        self,
        *,
        threat: ThreatModel,
        candidates: CandidateSource,
        steps: int = 10,
        step_size: float | None = None,
        samples: int = 5,
        choice: Choice = "image",
        text_weights: Sequence[float] = (0.6, 0.2, 0.2),
        scales: Sequence[float] = (0.5, 0.75, 1.25, 1.5),
        noise_std: float = 0.05,
        beam: int = 1,
        quirks: Quirks | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        if samples < 1:
            raise UserError(f"samples must be at least 1, got {samples}")
        if choice not in get_args(Choice):
            raise UserError(f"choice must be one of {', '.join(get_args(Choice))}, got {choice!r}")
        if len(text_weights) != 3 or not all(0 <= weight < math.inf for weight in text_weights):
            raise UserError(f"text_weights must be three finite numbers that are not negative, got {text_weights}")
        if not any(text_weights):
            raise UserError("text_weights must not all be zero: the text would have nothing to move away from")
        self.samples = samples
        self.choice = choice
        self.splits = choice == "image"
        self.text_weights = tuple(text_weights)
        self.sga = SGA(
            threat=threat,
            candidates=candidates,
            steps=steps,
            step_size=step_size,
            scales=scales,
            noise_std=noise_std,
            beam=beam,
            quirks=quirks,
        )

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        search = Search(away=self.sga.away_from_captions, mix=mixture_weights, project_trials=False)
        return self.along(search, model, batch, draws)

    def along(
        self, search: Search, model: VisionLanguageModel, batch: Batch, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Text, image, text; adversarial images [B, 3, H, W] and T texts."""
        words = self.sga.words
        plan = words.plan(model, batch.texts)
        with torch.no_grad():
            clean = model.encode_image(batch.images).features
        first = words.search(model, plan, clean[batch.txt2img])
        images, previous = self.trajectory_end(search, model, batch.replace(texts=first), draws, plan)
        with torch.no_grad():
            ends = [clean, model.encode_image(images).features, model.encode_image(previous).features]
        # The score is linear in the guide: one guide that is a weighted sum scores like the weighted sum of scores.
        guide = sum(weight * features for weight, features in zip(self.text_weights, ends, strict=True))
        assert isinstance(guide, Tensor)
        return images, words.search(model, plan, guide[batch.txt2img])

    @torch.enable_grad()
    def trajectory_end(
        self, search: Search, model: VisionLanguageModel, batch: Batch, draws: Draws, plan: TextPlan
    ) -> tuple[Tensor, Tensor]:
        """The final and the last but one iterate, against the captions of `batch` as they stand."""
        threat, sga = self.threat, self.sga
        if threat.eps == 0:
            return batch.images, batch.images
        value = search.away(model, batch, plan)
        x = previous = random_start(batch, threat, draws)
        for step in range(sga.steps):
            point = x
            if step:
                index = batch.index if self.choice == "image" else batch.index[:1]
                weights = search.mix(draws.uniform(f"mixture/{step}", index, (self.samples, 2)))
                a, b, c = weights.transpose(0, 1)[..., None, None, None].unbind(2)
                points = a * x + b * batch.images + c * previous
                point = self.most_harmful(points, model, batch, value, x, projected=search.project_trials)
            live = point.detach().requires_grad_(True)
            noise = sga.noise(batch, step, draws) if sga.scales else None
            (gradient,) = torch.autograd.grad(sga.over_views(model, value, live, noise).sum(), live)
            x, previous = self.stepped(x, gradient, batch.images, projected=True), x
        return x, previous

    def most_harmful(
        self, points: Tensor, model: VisionLanguageModel, batch: Batch, value: Bound, x: Tensor, *, projected: bool
    ) -> Tensor:
        """[B, 3, H, W]: of `points` [samples, B, 3, H, W] the one whose gradient takes `x` furthest in one step."""
        size = len(batch)
        at_once = 1 + len(self.sga.scales)  # as many as the views of a step, whose activations are held together

        def harm(images: Tensor) -> Tensor:
            """[k, B] of images [k * B, 3, H, W]."""
            state = model.encode_image(images)
            return torch.stack([value(rows_of(state, start, start + size)) for start in range(0, len(images), size)])

        harmed = []
        for part in points.split(at_once):
            live = part.flatten(0, 1).detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(harm(live).sum(), live)
            here, clean = (images.repeat(len(part), 1, 1, 1) for images in (x, batch.images))
            with torch.no_grad():
                harmed.append(harm(self.stepped(here, gradient, clean, projected=projected)))
        values = torch.cat(harmed)
        if self.choice == "batch":
            values = values.mean(1, keepdim=True).expand_as(values)
        best = values.nan_to_num(nan=-math.inf).argmax(0)
        return points[best, torch.arange(size, device=best.device)]

    def stepped(self, x: Tensor, gradient: Tensor, x0: Tensor, *, projected: bool) -> Tensor:
        """One step from `x` along `gradient`, inside ball and box where it is projected."""
        step_size, eps, norm, bounds = self.sga.step_size, self.threat.eps, self.threat.norm, self.threat.bounds
        if not projected:  # the ball stands around `x` itself and is wide enough
            x0, eps, bounds = x, max(step_size, eps), (-math.inf, math.inf)
        return ops.pgd_step(x, gradient, x0, eps=eps, step_size=step_size, norm=norm, bounds=bounds)


def rows_of(state: ImageState, start: int, stop: int) -> ImageState:
    """The state of the images `start:stop`."""
    tokens = None if state.tokens is None else state.tokens[start:stop]
    return ImageState(tokens=tokens, embeds=state.embeds[start:stop], features=state.features[start:stop])


def mixture_weights(draw: Tensor) -> Tensor:
    """Weights [..., 3] of current, clean and previous image from `draw` [..., 2], uniform in (-1, 1).

    Whole percents, each at least one, that sum to 1, distributed as in the published code: the first is uniform in
    1..100 and the second in 1..(100 - first), drawn again while nothing is left for the third; a first of 99 or 100
    becomes (98, 1, 1). So the current image has about half of the weight, and the other two a quarter each.

    >>> mixture_weights(torch.tensor([[-0.999, -0.999], [0.0, 0.0], [0.999, 0.999]])).mul(100).round().int().tolist()
    [[1, 1, 98], [49, 26, 25], [98, 1, 1]]
    """
    current = torch.arange(1, 99, device=draw.device)
    room = 99 - current
    chance = room / (100 - current)
    chance[-1] += 2
    return drawn_weights(draw, chance, torch.ones_like(room), room)


def drawn_weights(draw: Tensor, chance: Tensor, lowest: Tensor, room: Tensor) -> Tensor:
    """Weights [..., 3] from `draw` [..., 2]: the first is n percent as likely as `chance[n - 1]`, in any unit, says.

    The second is then one of `room[n - 1]` whole percents from `lowest[n - 1]` on, all alike, the third what is left.
    """
    unit = draw.add(1).div(2).clamp(0, 1)
    cumulative = chance.cumsum(0)
    row = torch.searchsorted(cumulative, unit[..., 0] * cumulative[-1]).clamp_max(len(chance) - 1)
    second = lowest[row] + torch.minimum((unit[..., 1] * room[row]).long(), room[row] - 1)
    return torch.stack((1 + row, second, 99 - row - second), -1) / 100
