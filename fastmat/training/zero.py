"""DeepSpeed ZeRO, stages 1 to 3: optimiser, gradients and weights sharded over the processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn

from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.training.engine import MOMENTS, adamw, set_rate
from fastmat.training.parameters import BoundedScale, bounded_scale
from fastmat.training.replica import Replica
from fastmat.training.settings import TrainSettings

REFUSED = {
    "optimizer": "fastmat makes the optimiser",
    "scheduler": "fastmat sets the learning rate",
    "fp16": "fp16 is not supported, set train.precision to bf16",
    "bf16": "weights stay fp32, set train.precision to bf16",
    "zero_optimization.offload_param": "offloading is not supported",
    "zero_optimization.offload_optimizer": "offloading is not supported",
    "zero_optimization.zero_hpz_partition_size": "hierarchical partitions are not supported",
    "zero_optimization.zero_quantized_weights": "quantised communication would change the result",
    "zero_optimization.zero_quantized_gradients": "quantised communication would change the result",
    "zero_optimization.mics_shard_size": "MiCS is not supported",
    "tensor_parallel": "tensor parallelism is not supported",
}


class Zero:
    """The engine's step decides for itself whether the gradients are finite, and leaves everything alone if not."""

    def __init__(
        self,
        accelerator: Accelerator,
        outer: nn.Module,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        settings: TrainSettings,
    ) -> None:
        self.stage = configure(accelerator, settings)
        self.name = f"zero{self.stage}"
        self.model = model
        self.trained: Mapping[str, Any] = trained  # DeepSpeed hangs its own attributes on parameters
        self.accelerator = accelerator
        self._replica = Replica(model)
        self._scale = bounded_scale(model, trained.values())
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        for parameter in model.parameters():
            if (
                not parameter.dim()
            ):  # DeepSpeed cannot send scalars out; where they leave the engine they are some again
                parameter.data = parameter.data.view(1)
        self.forward, _ = accelerator.prepare(outer, adamw(list(trained.values()), settings))

    @contextmanager
    def attacked(self) -> Iterator[VisionLanguageModel]:
        with self._whole(), self._replica.holding(self.model) as replica:
            yield replica

    def backward(self, loss: Tensor, *, rate: float) -> Tensor:
        set_rate(self._zero, rate)
        self.forward.backward(loss)
        self.forward.step()
        return torch.as_tensor(self.forward.get_global_grad_norm(), dtype=torch.float32)

    def step(self, *, update: bool) -> None:
        if update and self._scale is not None:
            self._clamp(self._scale)

    def weights(self) -> dict[str, Tensor]:
        with self._whole():
            if not self.accelerator.is_main_process:
                return {}
            return {
                name: value.detach().to("cpu", copy=True).view(self._shapes[name])
                for name, value in self.model.state_dict().items()
            }

    def moments(self) -> dict[str, Tensor]:
        state, pieces, found = self._zero.optimizer.state, self._pieces(), {}
        for name in self.trained:
            for key in MOMENTS:
                whole = torch.zeros(math.prod(self._shapes[name]), device=self.accelerator.device)
                if name in pieces:
                    flat, there, here, count = pieces[name]
                    whole.narrow(0, there, count).copy_(state[flat][key].narrow(0, here, count))
                dist.reduce(whole, dst=0)  # every element has one owner
                if self.accelerator.is_main_process:
                    found[f"{key}/{name}"] = whole.cpu().view(self._shapes[name])
        return found

    def load_moments(self, moments: Mapping[str, Tensor], *, updates: int) -> None:
        zero = self._zero
        for flat in zero.single_partition_of_fp32_groups if self.stage < 3 else zero.fp32_partitioned_groups_flat:
            empty = {key: torch.zeros_like(flat) for key in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.tensor(float(updates), device=flat.device), **empty}
        for name, (flat, there, here, count) in self._pieces().items():
            for key in MOMENTS:
                whole = moments[f"{key}/{name}"].flatten()
                zero.optimizer.state[flat][key].narrow(0, here, count).copy_(whole.narrow(0, there, count))

    @property
    def _zero(self) -> Any:
        """DeepSpeed's sharded optimiser around torch's."""
        return self.forward.optimizer

    def _whole(self) -> Any:
        """Inside, every parameter is whole in every process."""
        if self.stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(list(self.model.parameters()))

    @torch.no_grad()
    def _clamp(self, scale: BoundedScale) -> None:
        """In the fp32 master copy, by the process that holds it, and in what forwards read; nothing is exchanged."""
        parameter: Any = scale.parameter
        if self.stage == 3:
            copies = [safe_get_local_fp32_param(parameter), parameter.ds_tensor, parameter.data]
        else:
            held = parameter._hp_mapping
            copies = [parameter.data] if held is None else [held.get_hp_fragment(), parameter.data]
        for copy in copies:
            copy.clamp_(scale.low, scale.high)

    def _pieces(self) -> dict[str, tuple[Tensor, int, int, int]]:
        """Of every trained parameter that this process holds a piece of: the flat fp32 partition it lies in, where the
        piece begins in the parameter, where in the partition, and how long it is."""
        zero = self._zero
        pieces = {}
        for name, parameter in self.trained.items():
            if self.stage == 3:
                group, here, size = zero.grad_position[zero.get_param_id(parameter)]
                there = self.accelerator.process_index * size
                count = min(size, parameter.ds_numel - there)  # the last piece is padded
                if count > 0:
                    pieces[name] = (zero.fp32_partitioned_groups_flat[group], there, here, count)
            elif parameter._hp_mapping is not None:
                part, whole = parameter._hp_mapping.get_hp_fragment_address(), parameter._hp_mapping.lp_fragment_address
                group = next(i for i, own in enumerate(zero.bit16_groups) if any(p is parameter for p in own))
                pieces[name] = (zero.single_partition_of_fp32_groups[group], whole.start, part.start, part.numel)
        return pieces


def configure(accelerator: Accelerator, settings: TrainSettings) -> int:
    """Fill in what DeepSpeed must be told, and return the stage. Raises UserError for what this engine cannot do."""
    config: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config
    for path, reason in REFUSED.items():
        if asked_for(config, path):
            raise UserError(f"DeepSpeed's '{path}': {reason}; take it out of the DeepSpeed configuration")
    stage: int = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(f"DeepSpeed's zero_optimization.stage must be 1, 2 or 3, got {stage}; stage 0 is plain DDP")
    if stage == 3 and settings.compile:
        raise UserError("train.compile does not work with ZeRO stage 3; leave it off or use stage 1 or 2")
    if config.get("gradient_accumulation_steps", 1) not in (1, "auto"):
        raise UserError("DeepSpeed's gradient_accumulation_steps must be 1; train.micro_batch saves memory, exactly")
    config["gradient_accumulation_steps"] = 1
    config["train_micro_batch_size_per_gpu"] = 1  # of DeepSpeed's own counters only
    config["train_batch_size"] = accelerator.num_processes
    config["gradient_clipping"] = settings.clip_norm or 0.0
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    config["steps_per_print"] = 1 << 30
    return stage


def asked_for(config: Mapping[str, Any], path: str) -> bool:
    """Whether a dotted key is there and says more than no."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        return value.get("enabled", value.get("device", True)) not in (False, None, "none", "auto")
    return value is True or value not in (None, False, "none", "auto", 0, 1, -1)  # 1 and -1: partitions as they come
