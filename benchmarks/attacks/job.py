"""What an attack of the benchmark is: how ours, the published and the tuned loop are made, and how they are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastmat.attacks.base import context_of
from fastmat.attacks.draws import Draws
from fastmat.benchmarks.attacks.setting import Setting
from fastmat.benchmarks.attacks.words import Trace
from fastmat.build import Component, build_attack
from fastmat.models.dual_encoder import DualEncoder
from fastmat.types import AttackContext, Batch, ThreatModel

Dtype = Literal["float32", "bfloat16"]
Half = Literal["both", "text", "image"]
# "fastmat" finds what the language model proposes on the disk, as every run after the first does; "cold" computes it.
Opponent = Literal["fastmat", "cold", "published", "tuned"]


class Outcome(NamedTuple):
    """images [B, 3, H, W], T texts; trace: of the published text loop alone."""

    images: Tensor
    texts: Sequence[str]
    trace: Trace | None = None


# Noise in, outcome out; everything else is bound.
Runner = Callable[[Draws], Outcome]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attack on one batch. `component`: ours, as a config would name it.

    published, tuned: make the opponents' runners for a threat model. objective: [B] values that the image part ascends,
    in fp32, given final images and the texts it was guided by. halves: what it can be cut into.
    others: captions of the attack's context beside those of the batch.
    """

    name: str
    component: Component
    batch: Batch
    threat: ThreatModel
    published: Callable[[ThreatModel], Runner]
    tuned: Callable[[ThreatModel, DualEncoder], Runner]
    objective: Callable[[Tensor, Sequence[str]], Tensor]
    halves: tuple[Half, ...] = ("both", "text", "image")
    others: Sequence[str] = ()

    def threat_of(self, half: Half) -> ThreatModel:
        """A radius of 0 leaves the text part alone, 0 words the image part."""
        return ThreatModel(
            eps=0.0 if half == "text" else self.threat.eps, max_words=0 if half == "image" else self.threat.max_words
        )

    def context(self, model: DualEncoder) -> AttackContext:
        own = context_of(model, self.batch)
        if not self.others:
            return own
        groups = torch.arange(len(self.others), device=own.text_group.device) + own.text_group.max() + 1
        return replace(
            own,
            text_features=torch.cat((own.text_features, features(model, self.others))),
            text_group=torch.cat((own.text_group, groups)),
        )

    def runner(self, setting: Setting, who: Opponent, dtype: Dtype, half: Half) -> Runner:
        threat = self.threat_of(half)
        model = setting.model if dtype == "float32" else setting.lowered
        if who == "published":
            return self.published(threat)
        if who == "tuned":
            return self.tuned(threat, model)
        # The seed is not used: draws are always handed in.
        cache = setting.candidates if who == "fastmat" else None
        attack = build_attack(self.component, threat=threat, mlm=lambda: setting.mlm, seed=0, candidate_cache=cache)
        context = self.context(model)

        def run(draws: Draws) -> Outcome:
            made = attack(model, self.batch, context, draws=draws)
            return Outcome(made.images, made.texts)

        return run


@torch.no_grad()
def features(model: DualEncoder, texts: Sequence[str]) -> Tensor:
    chunks = [model.tokenize(texts[n : n + 256]).to(model.logit_scale.device) for n in range(0, len(texts), 256)]
    return torch.cat([model.encode_text(tokens).features for tokens in chunks])
