"""What one training run is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastmat.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """steps: outer steps. lr: peak of the schedule. betas, weight_decay: AdamW's; vectors and scalars never decay.

    warmup_steps: linear, then cosine to 0. clip_norm: largest gradient 2-norm; None: no clipping.
    precision: "bf16" runs the encoders under autocast; weights, logits and images stay fp32.
    norm_statistics: "fixed" keeps batch-norm in eval mode, so that adversarial views do not enter its statistics;
        "batch" trains them, each process on its own share.
    micro_batch: images, of all views, that a process encodes at a time, where the batch is more than its memory holds;
        the gradient is that of the whole batch, for one more forward. None: all at once.
    activation_checkpointing: blocks compute their insides again in the backward instead of keeping them.
    compile: the outer forward goes through torch.compile.
    save_every: steps between checkpoints; keep_last: how many stay. log_every: steps between lines of `log.jsonl`.
    """

    steps: int
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    clip_norm: float | None = 1.0
    precision: Literal["no", "bf16"] = "no"
    norm_statistics: Literal["fixed", "batch"] = "fixed"
    micro_batch: int | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    save_every: int = 500
    keep_last: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "keep_last", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UserError(f"micro_batch must be at least 1 or null, got {self.micro_batch}")
        if not self.lr > 0:
            raise UserError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise UserError(f"warmup_steps must lie between 0 and steps={self.steps}, got {self.warmup_steps}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"clip_norm must be positive or null, got {self.clip_norm}")
        if self.precision not in ("no", "bf16"):
            raise UserError(f"precision must be 'no' or 'bf16', got {self.precision!r}")
        if self.norm_statistics not in ("fixed", "batch"):
            raise UserError(f"norm_statistics must be 'fixed' or 'batch', got {self.norm_statistics!r}")
        if self.norm_statistics == "batch":
            for name in ("micro_batch", "activation_checkpointing"):
                if getattr(self, name):
                    raise UserError(
                        f"{name} runs forwards twice, which norm_statistics 'batch' would count twice; leave {name} "
                        "out or set norm_statistics to fixed"
                    )
