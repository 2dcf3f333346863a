"""The floor of a step: the FLOPs that it cannot do without, at the rate of a large matrix product on this machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from fastmat.benchmarks.harness import Timer
from fastmat.benchmarks.scaling.shapes import Model, Tower, vit
from fastmat.benchmarks.scaling.work import Texts, step_flops

PGD_STEPS = {"tecoa": 2}


def shape_of(folder: Path) -> Model | None:
    """The shape of an open_clip folder; None where its image tower is no ViT, or its text tower another library's."""
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    image, text = config["vision_cfg"], config["text_cfg"]
    if not isinstance(image.get("layers"), int) or "patch_size" not in image or "layers" not in text:
        return None
    return Model(
        name=folder.name,
        image=vit(
            side=image["image_size"],
            patch=image["patch_size"],
            layers=image["layers"],
            width=image["width"],
            embed=config["embed_dim"],
            extra=0,
        ),
        text=text_tower(text, embed=config["embed_dim"]),
    )


def text_tower(config: dict[str, Any], *, embed: int) -> Tower:
    width = config["width"]
    return Tower(
        layers=config["layers"],
        width=width,
        heads=config["heads"],
        hidden=4 * width,
        tokens=config["context_length"],
        embed=embed,
    )


def floor_flops(shape: Model, step: str, texts: Texts, *, batch: int) -> float:
    """Of `step`: "mat", "fare", "finetune" or "tecoa", whose prompts are encoded once in a run."""
    if step in PGD_STEPS:
        flops = shape.image.flops
        attack = PGD_STEPS[step] * (flops.forward + flops.input_backward)
        return batch * (attack + flops.forward + flops.full_backward)
    return step_flops(shape, step, texts, batch=batch, gpus=1).total


@torch.no_grad()
def product_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.5) -> float:
    """FLOPs per second of the fastest of several products of two square matrices."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    b, timer = a.T.contiguous(), Timer(device)
    a @ b
    best, begun = timer(lambda: a @ b), time.perf_counter()
    while time.perf_counter() - begun < seconds:
        best = min(best, timer(lambda: a @ b))
    return 2e3 * side**3 / best
