"""APGD on the image and a search over all words in turn, each against what the other found, until neither improves."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastmat.attacks.apgd import ascend_adaptively, farthest_start
from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.objectives import Objective
from fastmat.attacks.rivals import Rivals, Standing, columns, nearest_wrong, standing
from fastmat.attacks.search import check_restarts, check_steps, keep
from fastmat.attacks.word_substitution import TextPlan, WordSubstitution
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.text.candidates import CandidateSource
from fastmat.types import AttackContext, Batch, ThreatModel


class Found(NamedTuple):
    """Images [B, 3, H, W], T captions, and how they stand."""

    images: Tensor
    texts: tuple[str, ...]
    standing: Standing


class Alternating(Attack):
    """One run of `Strongest`; this project's composition of APGD (Croce and Hein, ICML 2020) and BERT-Attack's search.

    1. APGD raises `objective` against the captions as they stand, from `restarts` starts: random points of the sphere;
       from the second round on, one of them is the best image so far.
    2. Words of the original captions are substituted away from that image, once straight and once towards the wrong
       image that each caption likes best. Every word is tried as the first to be spent, so that with max_words 1 all
       single substitutions are tried.
    3. Images whose captions changed go back to 1, for at most `rounds` rounds.

    Each image keeps, with its captions, what stands best (`Standing`) against the frozen context; the clean pair is
    among the choices, and a round never makes it worse. In a gallery that is clean but for these images, that is what
    ranks at 1 count.

    objective: any; the captions it sees are adversarial, which `Rivals` (default) and `CosineToOwn` use, while
        `Contrastive` and `Margin` go by the context's. steps 100: AutoAttack's; restarts 2, rounds 3 and beam 4 are
        this project's choice. beam: texts per caption that are followed.
    Raises UserError for steps, restarts or rounds below 1.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        candidates: CandidateSource,
        objective: Objective | None = None,
        steps: int = 100,
        restarts: int = 2,
        rounds: int = 3,
        beam: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        check_steps(steps, None)
        check_restarts(restarts, random_start=True)
        if rounds < 1:
            raise UserError(f"rounds must be at least 1, got {rounds}")
        self.objective = objective or Rivals()
        self.steps = steps
        self.restarts = restarts
        self.rounds = rounds
        self.words = WordSubstitution(candidates=candidates, max_words=threat.max_words, beam=beam)

    @property
    def passes(self) -> tuple[int, int]:
        """Most image forwards and backwards per image; what an objective encodes when it is bound comes on top."""
        rounds = self.rounds if self.threat.max_words else 1
        ascents = self.restarts * rounds if self.threat.eps else 0
        return 1 + rounds + ascents * (self.steps + 1), ascents * self.steps

    @torch.no_grad()
    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        plan = self.words.plan(model, batch.texts)
        clean = model.encode_image(batch.images).features
        best = self._found(model, batch, context, plan, batch.images, clean, [batch.texts])
        going = torch.arange(len(batch), device=batch.images.device)
        for turn in range(self.rounds):
            # An image whose captions stayed has nothing new to be attacked with: leaving it out changes no result.
            part = some(batch.replace(texts=best.texts), going)
            images = best.images.clone()
            images[going] = self._ascend(model, part, context, draws, best.images[going], batch.images[going], turn)
            features = model.encode_image(images).features
            guides = self._guides(model, batch, context, plan, features)
            options = [best.texts, *(self._substituted(model, plan, guide) for guide in guides)]
            found = self._found(model, batch, context, plan, images, features, options)
            better = found.standing.beats(best.standing)
            before, best = best.texts, merge(better, found, best, batch)
            moved = torch.tensor([a != b for a, b in zip(before, best.texts, strict=True)], device=going.device)
            going = batch.txt2img[moved].unique()
            if not len(going):
                break
        return best.images, best.texts

    def _ascend(
        self,
        model: VisionLanguageModel,
        batch: Batch,
        context: AttackContext,
        draws: Draws,
        warm: Tensor,
        x0: Tensor,
        turn: int,
    ) -> Tensor:
        """The images that raise the objective most; x0, warm: the clean ones and the best so far."""
        if self.threat.eps == 0:
            return x0
        value = self.objective.bind(model, batch, context)
        best: tuple[Tensor, ...] | None = None
        for restart in range(self.restarts):
            start = warm
            if turn == 0 or restart:
                start = farthest_start(batch, self.threat, draws, turn * self.restarts + restart)
            found = ascend_adaptively(
                # The sum of no pixels: where a model lets no gradient through, it is zero instead of an error.
                lambda x: value(model.encode_image(x)) + 0 * x.sum((1, 2, 3)),
                x0,
                start,
                threat=self.threat,
                steps=self.steps,
            )
            best = found if best is None else keep(found[1] > best[1], found, best)
        assert best is not None
        return best[0]

    def _guides(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, plan: TextPlan, features: Tensor
    ) -> list[Tensor]:
        """What captions move away from, [T, E] each: their image, and their image less the worst wrong one.

        features: [B, E], of the images as they stand.
        """
        if not self.threat.max_words:
            return []
        own = features.float()[batch.txt2img]
        clean = self.words.features(model, batch.texts, plan=plan)
        wrong = context.image_features.float()[nearest_wrong(clean, batch, context)[1]]
        return [own, own - wrong]

    def _substituted(self, model: VisionLanguageModel, plan: TextPlan, guide: Tensor) -> tuple[str, ...]:
        """The texts least similar to their guide, over every word as the first to be spent."""
        texts = plan.texts
        lowest = (self.words.features(model, texts, plan=plan) * guide).sum(1)
        for first in range(max(map(len, plan.order), default=0)):
            later = replace(plan, order=tuple(order[first:] for order in plan.order))
            found = self.words.search(model, later, guide)
            cosines = (self.words.features(model, found, plan=plan) * guide).sum(1)
            lower = cosines < lowest
            texts, lowest = columns(lower.tolist(), found, texts), torch.where(lower, cosines, lowest)
        return texts

    def _found(
        self,
        model: VisionLanguageModel,
        batch: Batch,
        context: AttackContext,
        plan: TextPlan,
        images: Tensor,
        features: Tensor,
        options: list[tuple[str, ...]],
    ) -> Found:
        """The images (features: theirs) with, for each, the best of the captions that are its options."""
        best: Found | None = None
        for texts in dict.fromkeys(options):
            captions = self.words.features(model, texts, plan=plan)
            found = Found(images, texts, standing(features, captions, batch, context))
            best = found if best is None else merge(found.standing.beats(best.standing), found, best, batch)
        assert best is not None
        return best


def merge(chosen: Tensor, new: Found, old: Found, batch: Batch) -> Found:
    """`new` for the images that are chosen [B], else `old`."""
    images, lost, margin = keep(chosen, (new.images, *new.standing), (old.images, *old.standing))
    return Found(images, columns(chosen[batch.txt2img].tolist(), new.texts, old.texts), Standing(lost, margin))


def some(batch: Batch, rows: Tensor) -> Batch:
    """The images `rows` [R] (ascending) with their captions."""
    mine = torch.isin(batch.txt2img, rows)
    return Batch(
        images=batch.images[rows],
        texts=tuple(text for text, take in zip(batch.texts, mine.tolist(), strict=True) if take),
        txt2img=torch.searchsorted(rows, batch.txt2img[mine]),
        index=batch.index[rows],
        group=batch.group[rows],
    )
