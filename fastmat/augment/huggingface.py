"""What the generators share that are models of transformers: loading, naming, sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmat.errors import UserError
from fastmat.models.weights import weights_hash


def load_pretrained(classes: tuple[str, ...], path: str) -> tuple[Any, ...]:
    """`transformers.NAME.from_pretrained(path)` for each name. Code that a repository carries is never run.

    Raises UserError, naming the path, when transformers has no such class or cannot load it.
    """
    import transformers

    found = []
    for name in classes:
        try:
            found.append(getattr(transformers, name).from_pretrained(path))
        except Exception as error:  # transformers, safetensors and the hub each raise their own
            line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(
                f"{path!r} could not be loaded as {name} ({line}); give a folder in transformers' layout, or a hub id"
            ) from error
    return tuple(found)


def named_model(path: str, *modules: nn.Module) -> str:
    """Hub id, or name of the folder, and the beginning of the sha256 of the weights."""
    name = Path(path).resolve().name if Path(path).is_dir() else path
    return " ".join([name, *(f"sha256:{weights_hash(module)[:16]}" for module in modules)])


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Of nucleus sampling (Holtzman et al., 2020). temperature 0: the likeliest token each time.

    Raises UserError for values out of range.
    """

    top_p: float
    temperature: float
    max_new_tokens: int

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie above 0 and up to 1, got {self.top_p}")
        if not self.temperature >= 0:
            raise UserError(f"temperature must not be negative, got {self.temperature}")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


@torch.no_grad()
def sampled(model: Any, inputs: Mapping[str, Tensor], sampling: Sampling, *, seed: int) -> Tensor:
    """Token ids [N, L], a function of the inputs and the seed alone.

    The global random streams are as before afterwards.
    """
    chosen = {"do_sample": True, "top_p": sampling.top_p, "temperature": sampling.temperature, "top_k": 0}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return model.generate(
            **{name: value.to(model.device) for name, value in inputs.items()},
            **(chosen if sampling.temperature > 0 else {"do_sample": False}),
            num_beams=1,
            max_new_tokens=sampling.max_new_tokens,
        )
