"""Recorded inputs and outputs of the published implementations, found through `FASTMAT_GOLDEN`."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The JSON and the tensors (floats as fp32, as the recordings ask) of one set; skips when there are none."""
    folder = os.environ.get("FASTMAT_GOLDEN")
    if not folder:
        pytest.skip("FASTMAT_GOLDEN is not set: recordings of the published implementations are not at hand")
    path = Path(folder) / f"{name}.json"
    tensors = load_file(path.with_suffix(".safetensors")) if path.with_suffix(".safetensors").exists() else {}
    tensors = {key: value.float() if value.dtype == torch.float16 else value for key, value in tensors.items()}
    return json.loads(path.read_text()), tensors
