"""Weights to and from disk: safetensors, or torch files without code; every key accounted for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastmat.errors import UserError


def save_weights(model: nn.Module, path: Path, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a state dict as safetensors; the file appears whole or not at all, and equal arguments give equal bytes.

    metadata: plain values, kept as JSON under the one key "fastmat", since safetensors orders several at random.
    """
    save_state(model.state_dict(), path, metadata=metadata)


def save_state(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, Any] | None = None) -> None:
    """The same for tensors by name."""
    path = Path(path)
    state = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    partial = path.with_name(path.name + ".partial")
    told = None if metadata is None else {"fastmat": json.dumps(metadata, sort_keys=True)}
    save_file(state, partial, metadata=told)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a torch file read with `weights_only=True`.

    A torch file may nest its tensors under "state_dict" or "model". Raises UserError naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error
    content = read_plain(path)
    for nested in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(nested), Mapping):
            content = content[nested]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict of tensors")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def read_plain(path: Path) -> Any:
    """Tensors and plain values of a torch file; code in it is never run. Raises UserError naming the file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        raise UserError(
            f"{path} cannot be read as plain tensors; it is damaged or carries code, which is never run: "
            "convert it to safetensors where you trust it"
        ) from error


def load_weights(
    model: nn.Module, path: Path, *, rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
) -> None:
    """Load a file into `model`: every key must match in name and shape, or UserError lists what does not.

    rename: maps a foreign file's state to this model's keys.
    """
    state = read_state(path)
    load_state(model, state if rename is None else rename(state), source=str(path))


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str, most: int | None = 4) -> None:
    """Load tensors into `model`: every key must match in name and shape, or UserError lists what does not.

    source: where they came from. most: keys that are listed of each kind, None: all.
    """
    own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape),
    }
    if any(problems.values()):
        shown = {what: keys[:most] + ["..."] * (len(keys) > len(keys[:most])) for what, keys in problems.items()}
        listed = "; ".join(f"{len(keys)} {what} ({', '.join(shown[what])})" for what, keys in problems.items() if keys)
        raise UserError(f"{source} does not fit this model: {listed}; check the model's name and configuration")
    model.load_state_dict(dict(state))


def weights_hash(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of every parameter and buffer, on whatever device they are."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
