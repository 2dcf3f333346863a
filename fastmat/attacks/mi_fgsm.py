"""MI-FGSM: sign steps along an accumulated gradient (Dong et al., CVPR 2018)."""

from __future__ import annotations

from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.objectives import Contrastive, Objective
from fastmat.attacks.search import ascend, check_steps
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import AttackContext, Batch, ThreatModel


class MIFGSM(Attack):
    """Image only, from the clean image. Defaults are the paper's: 10 steps of eps / steps, decay 1.

    steps: at least 1. step_size: in pixel units; None: eps / steps. decay: of the velocity, at least 0.
    objective: what is ascended.
    Raises UserError without a step, with a negative step size or decay.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        objective: Objective | None = None,
        steps: int = 10,
        step_size: float | None = None,
        decay: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        check_steps(steps, step_size)
        if not decay >= 0:
            raise UserError(f"decay must not be negative, got {decay}")
        self.objective = objective or Contrastive()
        self.steps = steps
        self.step_size = threat.eps / steps if step_size is None else step_size
        self.decay = decay

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        value = self.objective.bind(model, batch, context)
        images = ascend(
            lambda x, _: value(model.encode_image(x)),
            batch.images,
            batch.images,
            threat=self.threat,
            steps=self.steps,
            step_size=self.step_size,
            decay=self.decay,
        )
        return images, batch.texts
