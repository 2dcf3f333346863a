"""FSDP2: weights, gradients and optimiser sharded over the processes by PyTorch itself.

The model is one unit: gathered once for a step, gradients scattered once. For models of 0.2 to 0.4 B parameters that is
1 to 2 GB for the length of a step, and fewer collectives than one pair per block. Scalars cannot be sharded: every
process holds them whole, and their gradients are averaged here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.training.engine import MOMENTS, set_rate
from fastmat.training.parameters import clamp_logit_scale, decay_groups
from fastmat.training.replica import Replica
from fastmat.training.settings import TrainSettings


class FullySharded:
    name = "fsdp2"

    def __init__(
        self,
        accelerator: Accelerator,
        outer: nn.Module,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        settings: TrainSettings,
    ) -> None:
        check_environment(settings)
        self.model = model
        self.accelerator = accelerator
        self.clip_norm = settings.clip_norm or math.inf
        self._replica = Replica(model)
        scalars = {parameter for parameter in model.parameters() if not parameter.dim()}
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self.forward: Any = fully_shard(outer, mesh=mesh, ignored_params=scalars)
        self.trained = {name: p for name, p in model.named_parameters() if name in trained}  # the sharded ones
        groups = decay_groups(list(self.trained.values()), settings.weight_decay)
        # Not fused over tensors: whole and sharded ones do not mix there.
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, foreach=False)

    @contextmanager
    def attacked(self) -> Iterator[VisionLanguageModel]:
        self.forward.unshard()
        with self._replica.holding(self.model) as replica:
            yield replica
        self.forward.reshard()

    def backward(self, loss: Tensor, *, rate: float) -> Tensor:
        set_rate(self.optimizer, rate)
        loss.backward()
        gradients = [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]
        total = torch.zeros((), device=self.accelerator.device)
        for gradient in gradients:
            if isinstance(gradient, DTensor):
                total += gradient.to_local().square().sum()
        dist.all_reduce(total)
        for gradient in gradients:
            if not isinstance(gradient, DTensor):
                dist.all_reduce(gradient)
                gradient /= self.accelerator.num_processes
                total += gradient.square().sum()
        norm = total.sqrt()
        share = (self.clip_norm / (norm + 1e-6)).clamp_max(1.0)  # as torch.nn.utils.clip_grad_norm_
        for gradient in gradients:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(share)
        return norm

    def step(self, *, update: bool) -> None:
        if update:
            self.optimizer.step()
            clamp_logit_scale(self.model)
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        self.forward.reshard()
        return self._on_first(dict(self.model.state_dict()))

    def moments(self) -> dict[str, Tensor]:
        state = self.optimizer.state  # empty for a parameter that no term has reached yet
        found = {
            f"{key}/{name}": state[p][key] if state[p] else torch.zeros_like(p)
            for name, p in self.trained.items()
            for key in MOMENTS
        }
        return self._on_first(found)

    def load_moments(self, moments: Mapping[str, Tensor], *, updates: int) -> None:
        for name, parameter in self.trained.items():
            own = {}
            for key in MOMENTS:
                whole = moments[f"{key}/{name}"].to(self.accelerator.device, copy=True)
                if isinstance(parameter, DTensor):
                    whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
                own[key] = whole
            self.optimizer.state[parameter] = {"step": torch.tensor(float(updates)), **own}

    def _on_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.accelerator.is_main_process:
                found[name] = whole.detach().to("cpu", copy=True)
        return found


def check_environment(settings: TrainSettings) -> None:
    """Raise UserError for what this engine cannot do."""
    check_version()
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise UserError("FSDP's offloading of parameters is not supported; set fsdp_offload_params to false")
    if settings.compile:
        raise UserError("train.compile does not work with FSDP2; leave it off or use DDP")


def check_version() -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("of FSDP only the second version is supported: set fsdp_version to 2 in the accelerate config")
