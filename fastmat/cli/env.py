"""Show what results depend on: versions of fastmat, Python and the libraries, and the devices.

fastmat env
"""

from __future__ import annotations

import argparse
from importlib import metadata

import torch

from fastmat.build import resolve_device
from fastmat.cli.parser import Parser
from fastmat.evaluation.results import environment

LIBRARIES = (
    "torchvision", "triton", "transformers", "open_clip_torch", "timm", "accelerate", "deepspeed", "safetensors",
    "scikit-learn", "numpy", "pillow", "pydantic",
)  # fmt: skip


def add_arguments(parser: Parser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> None:
    found = environment(resolve_device("auto"))
    found["threads"] = torch.get_num_threads()
    found["cuda devices"] = torch.cuda.device_count()
    found |= {library: version_of(library) for library in LIBRARIES}
    width = max(map(len, found))
    print("\n".join(f"{key:<{width}}  {value}" for key, value in found.items()))


def version_of(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"
