"""The runs that engines are compared by: the same in one process and in several."""

import math
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from training.synthetic import THREAT, SwapWord, Synthetic, settings

from fastmat.defences.fare import FARE
from fastmat.defences.finetune import FineTune
from fastmat.defences.mat import MAT
from fastmat.defences.matching import Matching, MatchingSettings
from fastmat.defences.tecoa_itr import TeCoAITR
from fastmat.models.tiny import tiny_clip
from fastmat.models.tiny_fusion import tiny_albef, tiny_blip
from fastmat.training.interrupt import Interrupted
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
    """finetune; fare (an attack, one tower); tecoa_itr (an attack that contrasts); nan (a skipped step); hot (the
    logit scale at its bound); micro, recompute (less memory); albef, blip (matched across the
    processes), own (within each)."""
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
    elif name in ("albef", "own"):
        model = without_dropout(tiny_albef())
        told = settings(steps=4, lr=1e-3, save_every=2, micro_batch=2)
        matching = MatchingSettings(queue=32, ema_decay=0.9, ramp_steps=3, negatives_across=name == "albef")
        defence = Matching(defence=TeCoAITR(threat=THREAT, steps=2), model=model, settings=matching)
    elif name == "blip":
        model = without_dropout(tiny_blip())
        mat = MAT(threat=THREAT, text_search=SwapWord(), steps=1, pairs={"adv-clean": 1.0, "clean-adv": 0.5})
        matching = MatchingSettings(queue=24, ema_decay=0.9, keys="adv", negatives="online", negatives_across=True)
        defence = Matching(defence=mat, model=model, settings=matching)
    elif name == "tecoa_itr":
        defence = TeCoAITR(threat=THREAT, steps=2)
    return train(model, defence, Synthetic(size=8), settings=told, out=out, config={"run": name}, **others)


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """Because it drops other things in every process."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


@dataclass
class Until(Synthetic):
    """Asks this process to stop, as a scheduler does, while the last batch before `steps` is fetched."""

    steps: int = 0

    def iterate(self, start, stop, **share):
        for step, batch in zip(range(start, stop), super().iterate(start, stop, **share), strict=True):
            if step == self.steps - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def go_on(out: Path, steps: int, **others: object) -> None:
    """The run `finetune`, from where `out` stands to `steps`."""
    with pytest.raises(Interrupted) as stopped:
        train(
            tiny_clip(), FineTune(), Until(size=8, steps=steps), settings=settings(steps=4, lr=1e-3, save_every=2),
            out=out, resume=out.exists(), config={"run": "finetune"}, **others,
        )  # fmt: skip
    assert stopped.value.asked_by == signal.SIGTERM


def again(name: str, folder: Path, **others: object) -> None:
    """The run `folder/name`, as it was after two steps, goes on in `folder/again-name`."""
    out = folder / f"again-{name}"
    if others["accelerator"].is_main_process:
        shutil.copytree(folder / name, out, ignore=shutil.ignore_patterns("step-00000004", "model.safetensors"))
    others["accelerator"].wait_for_everyone()
    assert run(name, out, resume=True, **others).resumed_from == 2
