"""Texts perturbed in embedding space: the cheap alternative to substituted words.

FreeLB (Zhu et al., ICLR 2020) and VILLA (Gan et al., NeurIPS 2020): what is added to the token embeddings of a caption
ascends a loss by steps along its gradient, normalised over the caption. VILLA's text settings: step 1e-3, start at
zero, no bound (`max_norm` 0 in its code), 3 passes, the last of which moves nothing: 2 steps. What is not taken over is
"free" training, in which the weight gradients of every pass enter the update: here the outer forward sees the last
point alone, as with every other attack. A step costs a forward and a backward of the text tower; no language model and
no candidates are needed. What it finds is no text, so a model hardened by it must still be judged on words.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.attacks.search import check_steps
from fastmat.defences.inner import Captions, tokens_of
from fastmat.errors import UserError
from fastmat.models.protocol import TextState, TextTokens, VisionLanguageModel
from fastmat.ops import normal_noise

Choice = Literal["kl", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """texts, their tokens, and the clean embeddings [T, E]."""

    texts: tuple[str, ...]
    tokens: TextTokens
    clean: Tensor


class EmbeddingSpace:
    """A text search that moves embeddings; stands wherever `word_substitution` does.

    steps, step_size: a step moves a caption's embeddings by `step_size` in 2-norm over all of them. max_norm: radius of
        the 2-norm ball that the sum stays in; null: none.
    choice: what is ascended: "cosine" minus the similarity to the guide, cross-modal; "kl" KL(clean || moved) of the
        softmax of the embedding, uni-modal, as Co-Attack's.
    start: 2-norm of a random start, which "kl" needs, being flat at the clean text; null: 0 for "cosine", step_size for
        "kl". The draw is a function of the seed and the text.
    Raises UserError for bad numbers, and on a text tower that hides its token embeddings.
    """

    def __init__(
        self,
        *,
        steps: int = 2,
        step_size: float = 1e-3,
        max_norm: float | None = None,
        choice: Choice = "cosine",
        start: float | None = None,
        seed: int = 0,
    ) -> None:
        check_steps(steps, step_size)
        if max_norm is not None and not 0 < max_norm < math.inf:
            raise UserError(f"max_norm must be positive or null, got {max_norm}")
        if choice not in get_args(Choice):
            raise UserError(f"choice must be one of {', '.join(get_args(Choice))}, got {choice!r}")
        start = (step_size if choice == "kl" else 0.0) if start is None else start
        if not 0 <= start < math.inf:
            raise UserError(f"start must be a finite number that is not negative, got {start}")
        if choice == "kl" and not start:
            raise UserError("start must be positive for choice 'kl', which has no slope at the clean text")
        self.steps = steps
        self.step_size = step_size
        self.max_norm = math.inf if max_norm is None else max_norm
        self.choice = choice
        self.start = start
        self.seed = seed

    @torch.no_grad()
    def plan(self, model: VisionLanguageModel, texts: Sequence[str]) -> Plan:
        captions = Captions(tuple(texts))
        tokens = tokens_of(model, captions)
        return Plan(texts=captions.texts, tokens=tokens, clean=model.encode_text(tokens).embeds)

    @torch.enable_grad()
    def search(self, model: VisionLanguageModel, plan: Plan, guide: Tensor | None = None) -> Captions:
        """The same texts with what is added to their token embeddings.

        guide: [T, E] unit image features, one row per caption; needed by choice "cosine" alone.
        """
        if self.choice == "cosine" and (guide is None or len(guide) != len(plan.texts)):
            raise ValueError(f"choice 'cosine' needs a guide with {len(plan.texts)} rows, one per caption")
        shift = self._start(model, plan)
        for _ in range(self.steps):
            live = shift.detach().requires_grad_(True)
            value = self._value(model.encode_text(plan.tokens._replace(shift=live)), plan, guide)
            (gradient,) = torch.autograd.grad(value.sum(), live)
            shift = within(shift + self.step_size * _unit(gradient * plan.tokens.mask[:, :, None]), self.max_norm)
        return Captions(plan.texts, shift.detach())

    def _value(self, state: TextState, plan: Plan, guide: Tensor | None) -> Tensor:
        if self.choice == "cosine":
            assert guide is not None
            return -(state.features * guide).sum(-1)
        return F.kl_div(state.embeds.log_softmax(-1), plan.clean.softmax(-1), reduction="none").sum(-1)

    def _start(self, model: VisionLanguageModel, plan: Plan) -> Tensor:
        table = getattr(model, "token_embedding", None)
        if table is None:
            raise UserError("this text tower hides its token embeddings, so they cannot be perturbed; substitute words")
        length, device = plan.tokens.ids.shape[1], plan.clean.device
        if not self.start:
            return torch.zeros(len(plan.texts), length, table.embedding_dim, device=device)
        index = torch.tensor([_number(text) for text in plan.texts]).to(device, non_blocking=True)
        # Drawn for the whole context: how long the other captions are must not matter.
        noise = normal_noise(self.seed, index, (model.context_length, table.embedding_dim))[:, :length]
        return within(self.start * _unit(noise * plan.tokens.mask[:, :, None]), self.max_norm)


def within(shift: Tensor, max_norm: float) -> Tensor:
    """[T, L, D] scaled down to a 2-norm of at most `max_norm` per caption."""
    norm = shift.flatten(1).norm(dim=1).clamp_min(1e-12)
    return shift * (max_norm / norm).clamp_max(1)[:, None, None]


def _unit(x: Tensor) -> Tensor:
    """[T, L, D] of 2-norm 1 per caption; zeros stay. 1e-8: VILLA's guard."""
    return x / x.flatten(1).norm(dim=1).clamp_min(1e-8)[:, None, None]


def _number(text: str) -> int:
    """A 32-bit number of the text, so that its draw depends on nothing around it."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=4).digest(), "big")
