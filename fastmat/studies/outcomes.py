"""What an attack left of one model, on the disk: a cell of a study, which is not computed twice."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fastmat.errors import UserError
from fastmat.evaluation.metrics import Ranks
from fastmat.evaluation.results import write_atomic
from fastmat.evaluation.stages import Stages

SURVIVES = ("tr_survives", "ir_survives")


def write_outcome(path: Path, stages: Stages, *, inputs: str) -> None:
    """A safetensors file, whole or absent. inputs: sha256 of all that the outcome depends on."""
    tensors = {"txt2img": stages.ranks["itc"].txt2img}
    for scoring, ranks in stages.ranks.items():
        tensors |= {f"{scoring}.tr": ranks.tr, f"{scoring}.ir": ranks.ir}
    for name in SURVIVES:
        if (flags := getattr(stages, name)) is not None:
            tensors[name] = flags
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"inputs": inputs})
    write_atomic(path, content)


def read_outcome(path: Path, *, inputs: str) -> Stages | None:
    """What was written with the same inputs; None where there is no such file. Raises UserError on a damaged one."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("inputs") != inputs:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        scorings = [name.removesuffix(".tr") for name in tensors if name.endswith(".tr")]
        order = [name for name in ("itc", "itm", "itm+cosine") if name in scorings]
        ranks = {
            name: Ranks(tr=tensors[f"{name}.tr"], ir=tensors[f"{name}.ir"], txt2img=tensors["txt2img"])
            for name in order
        }
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and --resume makes it again") from error
    survives: dict[str, torch.Tensor | None] = {name: tensors.get(name) for name in SURVIVES}
    return Stages(ranks=ranks, **survives)
