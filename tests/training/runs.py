"""The runs that engines are compared by: the same in one process and in several."""

import math
from pathlib import Path

import torch
from training.synthetic import THREAT, Synthetic, model_with_state, settings

from fastmat.defences.fare import FARE
from fastmat.defences.finetune import FineTune
from fastmat.models.tiny import tiny_clip
from fastmat.training.loop import TrainReport, train


class NaNInLastProcess(FineTune):
    """The last process alone sees a NaN, and only at the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def loss(self, features):
        self.calls += 1
        last = not torch.distributed.is_initialized() or (
            torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        )
        bad = self.calls == 2 and last
        return {name: term * (math.nan if bad else 1.0) for name, term in super().loss(features).items()}


def run(name: str, out: Path, **others: object) -> TrainReport:
    """finetune; fare (an attack, one tower); nan (a skipped step); hot (the logit scale at its bound); micro, recompute
    (less memory)."""
    model = tiny_clip()
    told = settings(steps=4, lr=1e-3, save_every=2)
    defence = FineTune()
    if name == "fare":
        defence = FARE(threat=THREAT, teacher=tiny_clip(seed=1), steps=2)
    elif name == "nan":
        defence = NaNInLastProcess()
    elif name == "hot":
        torch.nn.init.constant_(model.log_logit_scale, 6.0)
    elif name == "micro":
        told = settings(steps=4, lr=1e-3, save_every=2, micro_batch=1)
    elif name == "recompute":
        told = settings(steps=4, lr=1e-3, save_every=2, activation_checkpointing=True)
    elif name == "norms":
        model = model_with_state()
    return train(model, defence, Synthetic(size=8), settings=told, out=out, config={"run": name}, **others)
