"""Co-Attack (Zhang et al., ACM MM 2022): the text first, then the image away from its clean self and from that text.

Switchable quirks: the text attack's (`fastmat.attacks.bert_attack`), `mid_max_length`, `one_sided_start`,
`clamp_start`, `last_caption_only`, `raw_images`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.fusion import FusedCaptions, fusion_model, kl_from, plan_of
from fastmat.attacks.objectives import Bound, KLFromClean
from fastmat.attacks.search import ascend, check_steps, random_start
from fastmat.attacks.word_substitution import TextPlan, WordSubstitution
from fastmat.errors import UserError
from fastmat.models.protocol import FusionModel, ImageState, VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.text.candidates import CandidateSource
from fastmat.text.encoded import represent
from fastmat.types import AttackContext, Batch, ThreatModel


class CoAttack(Attack):
    """Three forms, by `representation`. Each substitutes captions first, by the largest KL to what is clean; then the
    image ascends, per caption t that the first step made, with KL(a, b) = KL(softmax(a) || softmax(b)):

    "embeds", for models with one embedding space (CLIP), on projected embeddings:
        KL(clean, moved) + alpha_cross * KL(unit(t), unit(moved));
    "cls", for ALBEF: the same on the un-projected class tokens of both encoders;
    "fusion", for ALBEF: on the class token that an image and a text fuse to,
        KL(fused(clean, t), fused(moved, t)) + alpha_cross * KL(fused(clean, its source), fused(moved, t)).

    Note where alpha_cross stands: that is how the published code has it. The paper attacks a pair; the mean over all
    captions of an image is this project's choice: alpha_cross weighs the same however many there are. The published
    evaluation attacks every pair and keeps each image as crafted with its last caption (`Quirks.last_caption_only`).
    After the image it attacks the text once more, with the same input and so the same result: not repeated here. In the
    fusion form an image without captions has nothing to leave, and stays at its start.

    steps 10, step_size 1.25 eps/steps, alpha_cross 3 as in the published code. candidates: what proposes
    substitutes; beam: texts per caption that are followed.
    Raises UserError without a step, with a negative step size or alpha_cross, or a model that lacks the representation.
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
        representation: Literal["embeds", "cls", "fusion"] = "embeds",
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
        self.representation: Literal["embeds", "cls", "fusion"] = representation
        self.quirks = quirks or Quirks()
        self.words = WordSubstitution(
            candidates=candidates,
            max_words=threat.max_words,
            choice="kl",
            importance=representation,
            compare=representation,
            beam=beam,
            quirks=self.quirks,
        )

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        plan = plan_of(self.words, model, batch)
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
        if self.representation == "fusion":
            return self._bind_fused(fusion_model(model), batch, texts)
        from_clean = KLFromClean(representation=self.representation).bind(model, batch, context)
        own, owner = self._judging(batch)
        captions = self._captions(model, texts, plan)[own]
        from_captions = mean_kl_from(captions, owner, len(batch))
        return lambda state: from_clean(state) + self.alpha_cross * from_captions(self._unit(state, captions))

    def _bind_fused(self, model: FusionModel, batch: Batch, texts: Sequence[str]) -> Bound:
        own, owner = self._judging(batch)
        length, count = self.quirks.mid_max_length, len(batch)
        source, moved = (
            FusedCaptions(model, self.words.read(model, [of[t] for t in own], max_length=length), owner, count)
            for of in (batch.texts, texts)
        )
        with torch.no_grad():
            image = model.encode_image(batch.images)
            clean, crossed = source(image).softmax(-1), moved(image).softmax(-1)

        def value(state: ImageState) -> Tensor:
            fused = moved(state)
            return moved.mean(kl_from(crossed, fused) + self.alpha_cross * kl_from(clean, fused))

        return value

    def _judging(self, batch: Batch) -> tuple[list[int], Tensor]:
        """The captions that the image is moved away from, and their images [T]."""
        owner = batch.txt2img
        if not self.quirks.last_caption_only:
            return list(range(len(owner))), owner
        last = {image: t for t, image in enumerate(owner.tolist())}
        return list(last.values()), torch.tensor(list(last), device=owner.device)

    def _captions(self, model: VisionLanguageModel, texts: Sequence[str], plan: TextPlan | None) -> Tensor:
        """[T, D] unit rows, of the representation."""
        length = self.quirks.mid_max_length
        if self.representation == "embeds":
            return self.words.features(model, texts, max_length=length, plan=plan)
        with torch.no_grad():
            tokens = self.words.read(model, texts, max_length=length).to(model.logit_scale.device)
            return F.normalize(represent(model.encode_text(tokens), self.representation), dim=-1)

    def _unit(self, state: ImageState, captions: Tensor) -> Tensor:
        """[B, D] unit rows, to compare with those of captions."""
        if self.representation == "embeds":
            return state.features
        rows = F.normalize(represent(state, self.representation), dim=-1)
        if rows.shape[1] != captions.shape[1]:
            raise UserError(
                f"representation 'cls' compares class tokens, but the image encoder's are {rows.shape[1]} wide and the "
                f"text encoder's {captions.shape[1]}; use 'embeds' or 'fusion'"
            )
        return rows


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
