"""Who holds which part of weights, gradients and optimiser: one interface, an implementation per way of sharding.

What leaves an engine is whole and named by parameter, so a checkpoint is the same for every engine and for any number
of processes, and nothing of an engine's own is ever unpickled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.training.forward import Forward
from fastmat.training.parameters import clamp_logit_scale, decay_groups
from fastmat.training.settings import TrainSettings

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by torch's names


class Engine(Protocol):
    """name: what checkpoints call it. forward: the outer module, wrapped. Every method is called by all processes."""

    name: str
    forward: Forward

    def attacked(self) -> AbstractContextManager[VisionLanguageModel]:
        """Inside, the model with whole weights and without anybody's hooks, for the inner attack."""
        ...

    def backward(self, loss: Tensor, *, rate: float) -> Tensor:
        """Gradients of the mean of `loss` over the processes, clipped; their norm before that, alike everywhere.

        rate: the learning rate. What is not finite makes the norm not finite.
        """
        ...

    def step(self, *, update: bool) -> None:
        """Take the step, or leave everything as it is; then there are no gradients. `update`: the norm is finite."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict on the first process, nothing on the others; read it before the next step."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """ "exp_avg/NAME" and "exp_avg_sq/NAME" of every trained parameter, likewise; after a step only."""
        ...

    def load_moments(self, moments: Mapping[str, Tensor], *, updates: int) -> None:
        """Go on with these, given whole to every process, after `updates` steps."""
        ...


def make_accelerator() -> Accelerator:
    """As the launcher asks for it. fastmat does its own mixed precision; gloo connects processes without a GPU.

    Raises UserError where Accelerate refuses what the launcher asks for.
    """
    try:
        return _accelerator()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"accelerate refuses these settings of the launcher ({str(error).splitlines()[0]})") from error


def _accelerator() -> Accelerator:
    if asked_for("ACCELERATE_USE_FSDP"):
        from fastmat.training.fsdp import check_version

        check_version()  # Accelerate's own words on a version that it needs more for are no help
    if torch.cuda.is_available() or os.environ.get("WORLD_SIZE", "1") == "1":
        return Accelerator(mixed_precision="no")
    if asked_for("ACCELERATE_USE_DEEPSPEED"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return Accelerator(mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    return Accelerator(mixed_precision="no", cpu=True)


def asked_for(variable: str) -> bool:
    """Whether the launcher says so in the environment."""
    return os.environ.get(variable, "false").lower() == "true"


def make_engine(
    accelerator: Accelerator,
    outer: nn.Module,
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    settings: TrainSettings,
) -> Engine:
    """The engine that the launcher asks for. outer: the module to wrap, which holds `model`. trained: by name.

    Raises UserError for what an engine cannot do.
    """
    if asked_for("ACCELERATE_USE_DEEPSPEED"):
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            raise UserError(
                "DeepSpeed was asked for and use_cpu forbids it; without a GPU set DS_ACCELERATOR=cpu instead"
            )
        from fastmat.training.zero import Zero

        return Zero(accelerator, outer, model, trained, settings)
    if asked_for("ACCELERATE_USE_FSDP") and accelerator.num_processes > 1:
        from fastmat.training.fsdp import FullySharded

        return FullySharded(accelerator, outer, model, trained, settings)
    return Replicated(accelerator, outer, model, trained, settings)


def adamw(parameters: list[nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    """Fused: one pass over memory, on a CPU too, where the plain one makes a dozen and a wait per tensor."""
    groups = decay_groups(parameters, settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


class Replicated:
    """One process, or DDP: every process holds everything, and gradients are averaged."""

    def __init__(
        self,
        accelerator: Accelerator,
        outer: nn.Module,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        settings: TrainSettings,
    ) -> None:
        self.name = "ddp" if accelerator.num_processes > 1 else "single"
        self.model = model
        self.trained = trained
        self.clip_norm = settings.clip_norm or math.inf
        self.accelerator = accelerator
        self.optimizer = adamw(list(trained.values()), settings)
        self.forward, self._prepared = accelerator.prepare(outer, self.optimizer)

    def attacked(self) -> AbstractContextManager[VisionLanguageModel]:
        return nullcontext(self.model)  # type: ignore[arg-type]

    def backward(self, loss: Tensor, *, rate: float) -> Tensor:
        set_rate(self.optimizer, rate)
        self.accelerator.backward(loss)
        norm: Tensor = self.accelerator.clip_grad_norm_(list(self.trained.values()), self.clip_norm)
        return norm

    def step(self, *, update: bool) -> None:
        if update:
            self._prepared.step()
            clamp_logit_scale(self.model)
        self._prepared.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict()) if self.accelerator.is_main_process else {}

    def moments(self) -> dict[str, Tensor]:
        if not self.accelerator.is_main_process:
            return {}
        state = self.optimizer.state  # empty for a parameter that no term has reached yet
        return {
            f"{key}/{name}": state[p][key] if state[p] else torch.zeros_like(p)
            for name, p in self.trained.items()
            for key in MOMENTS
        }

    def load_moments(self, moments: Mapping[str, Tensor], *, updates: int) -> None:
        for name, parameter in self.trained.items():
            own = {key: moments[f"{key}/{name}"].to(parameter.device, copy=True) for key in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(updates), device=parameter.device), **own}


def set_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def check_moments(moments: Mapping[str, Tensor], trained: Mapping[str, nn.Parameter]) -> None:
    """Raise UserError unless there are moments of every trained parameter, in its shape, and no others."""
    wanted = {f"{key}/{name}": tuple(p.shape) for name, p in trained.items() for key in MOMENTS}
    found = {key: tuple(value.shape) for key, value in moments.items()}
    different = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if different:
        raise UserError(
            f"the optimiser state is of other parameters ({', '.join(different[:3])}{', ...' * (len(different) > 3)}); "
            "resume with the model and the defence that the run was started with"
        )
