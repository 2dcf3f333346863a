"""Trains gates on calibration pairs while the encoder stands still, so that features are all that is ever needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.alignment.dynamic import Gate
from fastmat.alignment.pairs import Pairs
from fastmat.errors import UserError
from fastmat.ops import contrastive_loss


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """reduction, gamma: of `Gate`. rounds: how often the pairs are made, the first time without a correction, then by
    an attack through the gates as they stand; pairs of earlier rounds stay. steps: of AdamW in each round; batch_size:
    pairs in a step. itc: the weight of an InfoNCE term with the captions, at the image projection. All but the
    reduction are this project's choices.
    """

    reduction: int = 16
    gamma: float = 1.0
    rounds: int = 3
    steps: int = 300
    batch_size: int = 128
    lr: float = 3e-3
    weight_decay: float = 1e-4
    itc: float = 0.0

    def __post_init__(self) -> None:
        for name in ("reduction", "rounds", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, least in (("gamma", 1e-12), ("lr", 1e-12), ("weight_decay", 0), ("itc", 0)):
            if not getattr(self, name) >= least:
                raise UserError(f"{name} must be {'positive' if least else 'at least 0'}, got {getattr(self, name):g}")


def restoring_loss(gate: Callable[[Tensor], Tensor], clean: Tensor, adversarial: Tensor) -> Tensor:
    """The mean over rows of |gate(z') - z|^2 + |gate(z) - z|^2; over tokens too, where there are some.

    >>> restoring_loss(lambda z: z, torch.zeros(2, 3), torch.ones(2, 3))
    tensor(3.)
    """
    return sum((gate(z) - clean).square().sum(-1).mean() for z in (adversarial, clean))  # type: ignore[return-value]


def train_gates(
    gates: Mapping[str, Gate],
    renew: Callable[[], Mapping[str, Pairs]],
    settings: GateSettings,
    *,
    logit_scale: float = 1.0,
    seed: int = 0,
) -> list[float]:
    """Train `gates`, by site, in place; the mean loss of every round's last tenth, in units of the features' size.

    renew: makes pairs by site with the gates as they stand; called once per round. logit_scale: of the itc term.
    """
    trained = [gate.train().requires_grad_(True) for gate in gates.values()]
    optimiser = torch.optim.AdamW(
        [parameter for gate in trained for parameter in gate.parameters()],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
    )
    generator = torch.Generator().manual_seed(seed)
    pairs: dict[str, Pairs] = {}
    reached = []
    for _ in range(settings.rounds):
        fresh = renew()
        pairs = {site: pairs[site].joined(fresh[site]) if pairs else fresh[site] for site in gates}
        losses = []
        for _ in range(settings.steps):
            loss = torch.stack(
                [_loss(gate, pairs[site], settings, logit_scale, generator) for site, gate in gates.items()]
            ).sum()
            optimiser.zero_grad()
            with torch.enable_grad():
                loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        reached.append(float(torch.stack(losses[-max(1, settings.steps // 10) :]).mean()))
    for gate in trained:
        gate.eval().requires_grad_(False)
    return reached


@torch.enable_grad()
def _loss(gate: Gate, pairs: Pairs, settings: GateSettings, logit_scale: float, generator: torch.Generator) -> Tensor:
    """Of one drawn batch; divided by the feature's squared size, so that it means the same for every model."""
    count = min(settings.batch_size, len(pairs.clean))
    rows = torch.randperm(len(pairs.clean), generator=generator)[:count].to(pairs.clean.device)
    clean, adversarial = pairs.clean[rows], pairs.adversarial[rows]
    loss = restoring_loss(gate, clean, adversarial) / (gate.unit.square() * gate.width)
    if settings.itc and pairs.site == "image" and pairs.text_features is not None and pairs.group is not None:
        features, group = F.normalize(gate(adversarial), dim=-1), pairs.group[rows]
        texts = pairs.text_features[rows]
        loss = loss + settings.itc * contrastive_loss(features, texts, logit_scale, image_group=group, text_group=group)
    return loss
