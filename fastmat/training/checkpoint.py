"""Checkpoints: whole or absent, checked by sha256, enough to continue bit for bit.

One folder per checkpoint, `checkpoints/step-00000500/`: weights.safetensors, optimizer.pt, state.json (steps done, what
the run was told) and manifest.json (sha256 of the others). It is written under another name, flushed, then renamed.
The number of steps done is also the state of the schedule, of the data and of every random stream, because the loop
makes all three functions of (seed, step). Nothing is unpickled: tensors and plain values only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from fastmat.errors import UserError
from fastmat.models.weights import load_weights, read_plain, save_weights


def save_checkpoint(
    folder: Path,
    *,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Write `folder/step-N` for `state["step"]` = N and drop all but the newest `keep_last`. Every process calls it."""
    target = folder / f"step-{state['step']:08d}"
    partial = folder / f".{target.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_weights(model, partial / "weights.safetensors")
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        manifest = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*partial.iterdir(), partial]:
            flush(path)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        flush(folder)
        for old in checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files match its manifest; damaged ones are passed over with a warning."""
    for path in reversed(checkpoints(folder)):
        damaged = damaged_file(path)
        if damaged is None:
            return path
        warnings.warn(f"checkpoint {path} is damaged ({damaged}); trying the one before")
    return None


def damaged_file(path: Path) -> str | None:
    """Name of the first file that is missing or differs from the manifest; None when all is well."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return "manifest.json"
    for name, digest in manifest.items():
        if not (path / name).is_file() or sha256(path / name) != digest:
            return str(name)
    return None


def read_run_state(path: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """state.json of a checkpoint; raises UserError listing what differs between its run and `told`."""
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    different = differences(state["told"], told)
    if different:
        raise UserError(
            f"{path} belongs to another run: {'; '.join(different[:5])}{'; ...' if len(different) > 5 else ''}; "
            "resume with what it was started with, or train into another folder"
        )
    return state


def load_checkpoint(path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Weights and optimiser, in place. Raises UserError where they do not fit."""
    load_weights(model, path / "weights.safetensors")
    optimizer.load_state_dict(read_plain(path / "optimizer.pt"))


def differences(then: Any, now: Any, key: str = "") -> list[str]:
    """Where two trees of plain values differ, in words.

    >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
    ['a.b was 1, is now 3']
    """
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        found = []
        for name in sorted(then.keys() | now.keys()):
            found += differences(then.get(name), now.get(name), f"{key}.{name}" if key else name)
        return found
    return [] if then == now else [f"{key} was {then}, is now {now}"]


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
