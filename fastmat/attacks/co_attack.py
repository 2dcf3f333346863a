"""Co-Attack (Zhang et al., ACM MM 2022): the text first, then the image away from its clean self and from that text.

Switchable quirks: the text attack's (`fastmat.attacks.bert_attack`), `mid_max_length`, `one_sided_start`,
`clamp_start`, `last_caption_only`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.objectives import Bound, KLFromClean
from fastmat.attacks.search import ascend, check_steps, random_start
from fastmat.attacks.word_substitution import TextPlan, WordSubstitution
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.text.candidates import CandidateSource
from fastmat.types import AttackContext, Batch, ThreatModel


class CoAttack(Attack):
    """The uni-modal form, for models with one embedding space (CLIP).

    1. captions are substituted by the largest KL to their clean embedding;
    2. the image ascends KL(softmax(clean) || softmax(moved)) + alpha_cross * the mean over its adversarial captions of
       KL(softmax(unit(caption)) || softmax(unit(moved))), on projected embeddings.

    The paper attacks a pair; the mean over all captions of an image is this project's choice: alpha_cross weighs the
    same however many there are. The published evaluation attacks every pair and keeps each image as crafted with its
    last caption (`Quirks.last_caption_only`). After the image it attacks the text once more, with the same input and
    so the same result: not repeated here. The paper's other form, on the output of a fusion encoder, weighs
    different terms and has its own text attack; it is not part of this class, and neither are un-projected tokens.

    steps 10, step_size 1.25 eps/steps, alpha_cross 3 as in the published code. candidates: what proposes
    substitutes; beam: texts per caption that are followed.
    Raises UserError without a step, or with a negative step size or alpha_cross.
    """

    official = Quirks.official(text_max_length=30).but(mid_max_length=77)

    def __init__(
        self,
        *,
        threat: ThreatModel,
        candidates: CandidateSource,
        steps: int = 10,
        step_size: float | None = None,
        alpha_cross: float = 3.0,
        beam: int = 1,
        quirks: Quirks | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        check_steps(steps, step_size)  # before dividing by it
        if not 0 <= alpha_cross < math.inf:
            raise UserError(f"alpha_cross must be a finite number that is not negative, got {alpha_cross}")
        self.steps = steps
        self.step_size = 1.25 * threat.eps / steps if step_size is None else step_size
        self.alpha_cross = alpha_cross
        self.quirks = quirks or Quirks()
        self.words = WordSubstitution(
            candidates=candidates,
            max_words=threat.max_words,
            choice="kl",
            importance="embeds",
            compare="embeds",
            beam=beam,
            quirks=self.quirks,
        )

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        plan = self.words.plan(model, batch.texts)
        texts = self.words.search(model, plan)
        value = self.bind(model, batch, context, texts, plan)
        quirks = self.quirks
        images = ascend(
            lambda x, step: value(model.encode_image(x)),
            batch.images,
            random_start(batch, self.threat, draws, one_sided=quirks.one_sided_start, clamp=quirks.clamp_start),
            threat=self.threat,
            steps=self.steps,
            step_size=self.step_size,
        )
        return images, texts

    def bind(
        self,
        model: VisionLanguageModel,
        batch: Batch,
        context: AttackContext,
        texts: Sequence[str],
        plan: TextPlan | None = None,
    ) -> Bound:
        """What step 2 ascends, against the adversarial `texts` [T] of `batch`: image state to [B] values."""
        owner = batch.txt2img
        captions = self.words.features(model, texts, max_length=self.quirks.mid_max_length, plan=plan)
        if self.quirks.last_caption_only:
            last = {image: t for t, image in enumerate(owner.tolist())}
            captions, owner = captions[list(last.values())], torch.tensor(list(last), device=owner.device)
        from_clean = KLFromClean().bind(model, batch, context)
        from_captions = mean_kl_from(captions, owner, len(batch))
        return lambda state: from_clean(state) + self.alpha_cross * from_captions(state.features)


def mean_kl_from(targets: Tensor, owner: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    """rows [count, D] -> [count], the mean over the row's own targets [T, D] of KL(softmax(target) || softmax(row)).

    owner: [T], target to row; a row without targets has the value 0. With p the mean of a row's distributions p_t,
    mean KL(p_t || q) = mean KL(p_t || p) + KL(p || q): the first is constant, so a call costs the same for any T.
    """
    own = targets.softmax(-1, dtype=torch.float64)  # sums that fp32 cannot tell the order of
    # A product, because index_add_ has no fixed order on a GPU. [count, T], each row sums to one.
    belongs = (owner == torch.arange(count, device=owner.device)[:, None]).to(own)
    belongs /= belongs.sum(1, keepdim=True).clamp_min(1)
    mean = belongs @ own
    constant = (belongs @ (torch.xlogy(own, own) - torch.xlogy(own, mean[owner])).sum(-1)).float()
    mean = mean.float()
    return lambda rows: constant + F.kl_div(rows.log_softmax(-1), mean, reduction="none").sum(-1)
