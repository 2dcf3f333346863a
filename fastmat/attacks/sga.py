"""SGA: set-level guidance attack (Lu et al., ICCV 2023). Text, then image on a scale set, then text again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.search import ascend, check_steps, random_start
from fastmat.attacks.word_substitution import WordSubstitution
from fastmat.models.protocol import VisionLanguageModel
from fastmat.ops import cosine_to_set, scale_views
from fastmat.quirks import Quirks
from fastmat.text.mlm import MaskedLanguageModel
from fastmat.types import AttackContext, Batch, ThreatModel


class SGA(Attack):
    """All captions of an image together, the image at several scales.

    1. captions are substituted away from their clean image;
    2. the image ascends minus the sum of cosines to those captions, over itself and its scaled, noisy copies;
    3. the original captions are substituted away from the adversarial image.

    steps 10, step_size eps/4 (0.5/255 at 2/255), scales and noise_std 0.05 as in the published code; the unscaled view
    carries no noise. top_k, threshold: the masked language model's candidates.
    Raises UserError without a step or with a negative step size.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        mlm: MaskedLanguageModel,
        steps: int = 10,
        step_size: float | None = None,
        scales: Sequence[float] = (0.5, 0.75, 1.25, 1.5),
        noise_std: float = 0.05,
        top_k: int = 10,
        threshold: float = 0.3,
        quirks: Quirks | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        check_steps(steps, step_size)
        self.steps = steps
        self.step_size = threat.eps / 4 if step_size is None else step_size
        self.scales = tuple(scales)
        self.noise_std = noise_std
        self.quirks = quirks or Quirks()
        self.words = WordSubstitution(
            mlm=mlm,
            max_words=threat.max_words,
            choice="cosine",
            importance="features",
            top_k=top_k,
            threshold=threshold,
            quirks=self.quirks,
        )

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        plan = self.words.plan(model, batch.texts)
        with torch.no_grad():
            clean = model.encode_image(batch.images).features
        first = self.words.search(model, plan, clean[batch.txt2img])
        images = self.attack_images(model, batch.replace(texts=first), draws)
        with torch.no_grad():
            moved = model.encode_image(images).features
        return images, self.words.search(model, plan, moved[batch.txt2img])

    def attack_images(self, model: VisionLanguageModel, batch: Batch, draws: Draws) -> Tensor:
        """Step 2, against the captions of `batch` as they stand."""
        own = self.words.features(model, batch.texts, max_length=self.quirks.mid_max_length)

        def value(x: Tensor, step: int) -> Tensor:
            return self.over_views(model, batch, own, x, step, draws)

        start = random_start(batch, self.threat, draws)
        return ascend(value, batch.images, start, threat=self.threat, steps=self.steps, step_size=self.step_size)

    def over_views(
        self, model: VisionLanguageModel, batch: Batch, own: Tensor, x: Tensor, step: int, draws: Draws
    ) -> Tensor:
        """What step 2 ascends: minus the cosines of `x` and its scaled copies to `own` [T, E], summed, as [B]."""
        # One view at a time, so that no single tensor holds the activations of all of them.
        views = [x, *self.scaled(x, batch.index, step, draws)]
        cosines = [cosine_to_set(model.encode_image(view).features, own, batch.txt2img) for view in views]
        return -torch.stack(cosines).sum(0)

    def scaled(self, x: Tensor, index: Tensor, step: int, draws: Draws) -> Sequence[Tensor]:
        """The scaled copies of `x`, fresh noise for every step and scale."""
        if not self.scales:
            return ()
        noise = [draws.normal(f"scale/{step}/{i}", index, x.shape[1:]) for i in range(len(self.scales))]
        return tuple(
            scale_views(
                x,
                self.scales,
                torch.stack(noise).mul_(self.noise_std),
                antialias=self.quirks.antialias,
                bounds=self.threat.bounds,
            )
        )
