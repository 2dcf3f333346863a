"""SGA: set-level guidance attack (Lu et al., ICCV 2023). Text, then image on a scale set, then text again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.objectives import Bound, Objective
from fastmat.attacks.search import ascend, check_steps, random_start
from fastmat.attacks.word_substitution import TextPlan, WordSubstitution
from fastmat.models.protocol import VisionLanguageModel
from fastmat.ops import cosine_to_set, scale_views
from fastmat.quirks import Quirks
from fastmat.text.candidates import CandidateSource
from fastmat.types import AttackContext, Batch, ThreatModel


class SGA(Attack):
    """All captions of an image together, the image at several scales.

    1. captions are substituted away from their clean image;
    2. the image ascends minus the sum of cosines to those captions, over itself and its scaled, noisy copies;
    3. the original captions are substituted away from the adversarial image.

    steps 10, step_size eps/4 (0.5/255 at 2/255), scales and noise_std 0.05 as in the published code; the unscaled view
    carries no noise. candidates: what proposes substitutes; beam: texts per caption that are followed.
    objective: what step 2 sums over the views instead. `Target` makes it a targeted attack: the image moves towards a
    caption that is given, and in step 3 its own captions leave it, which lets the target rise.
    Raises UserError without a step or with a negative step size.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        candidates: CandidateSource,
        steps: int = 10,
        step_size: float | None = None,
        scales: Sequence[float] = (0.5, 0.75, 1.25, 1.5),
        noise_std: float = 0.05,
        objective: Objective | None = None,
        beam: int = 1,
        quirks: Quirks | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        check_steps(steps, step_size)
        self.steps = steps
        self.step_size = threat.eps / 4 if step_size is None else step_size
        self.scales = tuple(scales)
        self.noise_std = noise_std
        self.objective = objective
        self.quirks = quirks or Quirks()
        self.words = WordSubstitution(
            candidates=candidates,
            max_words=threat.max_words,
            choice="cosine",
            importance="features",
            beam=beam,
            quirks=self.quirks,
        )

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        plan = self.words.plan(model, batch.texts)
        if not self.threat.max_words:
            return self.attack_images(model, batch, context, draws, plan), batch.texts
        with torch.no_grad():
            clean = model.encode_image(batch.images).features
        first = self.words.search(model, plan, clean[batch.txt2img])
        images = self.attack_images(model, batch.replace(texts=first), context, draws, plan)
        with torch.no_grad():
            moved = model.encode_image(images).features
        return images, self.words.search(model, plan, moved[batch.txt2img])

    def attack_images(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws, plan: TextPlan
    ) -> Tensor:
        """Step 2, against the captions of `batch` as they stand; plan: of what they were before."""
        if self.objective is None:
            value = self.away_from_captions(model, batch, plan)
        else:
            value = self.objective.bind(model, batch, context)
        return ascend(
            lambda x, noise: self.over_views(model, value, x, noise),
            batch.images,
            random_start(batch, self.threat, draws),
            threat=self.threat,
            steps=self.steps,
            step_size=self.step_size,
            noise=(lambda step: self.noise(batch, step, draws)) if self.scales else None,
        )

    def away_from_captions(self, model: VisionLanguageModel, batch: Batch, plan: TextPlan) -> Bound:
        """Minus the sum of cosines to the captions of `batch`; plan: of what they were before."""
        own = self.words.features(model, batch.texts, max_length=self.quirks.mid_max_length, plan=plan)
        return lambda state: -cosine_to_set(state.features, own, batch.txt2img)

    def over_views(self, model: VisionLanguageModel, value: Bound, x: Tensor, noise: Tensor | None) -> Tensor:
        """The sum of `value` over `x` and its scaled copies, as [B]."""
        # One view at a time, so that no single tensor holds the activations of all of them.
        views = [x]
        if noise is not None:
            antialias, bounds = self.quirks.antialias, self.threat.bounds
            views += scale_views(x, self.scales, noise, antialias=antialias, bounds=bounds)
        return torch.stack([value(model.encode_image(view)) for view in views]).sum(0)

    def noise(self, batch: Batch, step: int, draws: Draws) -> Tensor:
        """[scales, B, 3, H, W]: fresh for every step and scale."""
        shape = batch.images.shape[1:]
        drawn = [draws.normal(f"scale/{step}/{i}", batch.index, shape) for i in range(len(self.scales))]
        return torch.stack(drawn).mul_(self.noise_std)
