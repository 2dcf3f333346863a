"""How a data-parallel engine divides the model's state over P processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """stage: 0 is DDP; ZeRO 1 divides optimiser states, 2 gradients as well, 3 weights as well.

    gathers: of stage 3, how often the weights are made whole. "pass": by every forward and every backward of a tower,
        as the ZeRO paper has it, so PGD-N adds 2N. "step": once for the whole inner attack, and once for the outer
        update, from forward to backward; that is how fastmat runs it, with DeepSpeed's defaults for models of fewer
        than 1e9 parameters (`stage3_max_reuse_distance`).
    """

    stage: int
    gathers: Literal["never", "step", "pass"] = "never"


STRATEGIES = {
    "ddp": Strategy(stage=0),
    "zero1": Strategy(stage=1),
    "zero2": Strategy(stage=2),
    "zero3": Strategy(stage=3, gathers="step"),
    "zero3-pass": Strategy(stage=3, gathers="pass"),
}
