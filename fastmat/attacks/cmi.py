"""CMI-Attack: collaborative multimodal interaction (Fu et al., 2024, arXiv 2403.10883).

Constants and order follow the authors' code, fuhaha824/CMI-Attack, CMI_Attack.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.search import ascend, random_start
from fastmat.attacks.sga import SGA
from fastmat.attacks.word_substitution import TextPlan
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.text.candidates import CandidateSource
from fastmat.types import AttackContext, Batch, ThreatModel


class CMI(Attack):
    """Text, then image; each step on one modality looks at the other one under attack, and the text is not redone.

    1. captions are substituted away from their image, which stands at a random point of the ball;
    2. there, SGA's loss over the scale set, against those captions, gives a gradient that begins a momentum; the image
       takes a step, which counts only where step 1 is done again (`text_steps` above 1);
    3. from another random point the image takes `steps` steps against the last captions, along that momentum.

    text_steps 1 (the paper's N), steps 10 (M), step_size eps/4 (0.5/255 at 2/255), decay 0.9: the published code.
    scales, noise_std, candidates, beam, quirks: as in SGA; of its quirks `mid_max_length` is not published here.
    The published candidates are `Neighbours` in GloVe with `MaskedCandidates` as fallback.
    Raises UserError without a step of either kind, or with a negative step size or decay.
    """

    official = Quirks.official().but(mid_max_length=None)

    def __init__(
        self,
        *,
        threat: ThreatModel,
        candidates: CandidateSource,
        text_steps: int = 1,
        steps: int = 10,
        step_size: float | None = None,
        decay: float = 0.9,
        scales: Sequence[float] = (0.5, 0.75, 1.25, 1.5),
        noise_std: float = 0.05,
        beam: int = 1,
        quirks: Quirks | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        if text_steps < 1:
            raise UserError(f"text_steps must be at least 1, got {text_steps}")
        if not 0 <= decay < torch.inf:
            raise UserError(f"decay must be a finite number that is not negative, got {decay}")
        self.text_steps = text_steps
        self.decay = decay
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
        words = self.sga.words
        plan = words.plan(model, batch.texts)
        x = random_start(batch, self.threat, draws)
        velocity = torch.zeros_like(x)
        for step in range(self.text_steps):
            with torch.no_grad():
                guide = model.encode_image(x).features
            attacked = batch.replace(texts=words.search(model, plan, guide[batch.txt2img]))
            x = self.climb(model, attacked, plan, x, velocity, range(step, step + 1), draws)
        x = random_start(batch, self.threat, draws, restart=1)
        last = range(self.text_steps, self.text_steps + self.sga.steps)
        return self.climb(model, attacked, plan, x, velocity, last, draws), attacked.texts

    def climb(
        self,
        model: VisionLanguageModel,
        batch: Batch,
        plan: TextPlan,
        x: Tensor,
        velocity: Tensor,
        steps: range,
        draws: Draws,
    ) -> Tensor:
        """`x` after these steps away from the captions of `batch`; they are added to `velocity`, in place.

        plan: of what the captions were before. steps: their numbers, which the noise of the views goes by.
        """
        sga = self.sga
        value = sga.away_from_captions(model, batch, plan)
        return ascend(
            lambda x, noise: sga.over_views(model, value, x, noise),
            batch.images,
            x,
            threat=self.threat,
            steps=len(steps),
            step_size=sga.step_size,
            decay=self.decay,
            velocity=velocity,
            noise=(lambda step: sga.noise(batch, steps[step], draws)) if sga.scales else None,
        )
