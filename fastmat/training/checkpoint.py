"""Checkpoints: whole or absent, checked by sha256, enough to continue bit for bit.

One folder per checkpoint, `checkpoints/step-00000500/`: weights.safetensors, optimizer.safetensors, memory.safetensors
where a defence has a memory (momentum encoders, queues), state.json (steps done, what the run was told, who wrote it)
and manifest.json (sha256 of the others). It is written under another name,
flushed, then renamed. The number of steps done is also the state of the schedule, of the data and of every random
stream, because the loop makes all three functions of (seed, step). Weights and optimiser are whole and named by
parameter, whatever engine trained them, so another engine or another number of processes can go on with them.
Nothing is unpickled: tensors and plain values only.
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

from safetensors import SafetensorError
from torch import Tensor, nn

from fastmat.errors import UserError
from fastmat.models.weights import read_state, save_state

BEST = "best"  # a file beside the checkpoints: the name of the one that is kept, however old


def save_checkpoint(
    folder: Path,
    *,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep_last: int,
    memory: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder/step-N` for `state["step"]` = N; of the others, the newest and the best stay, `keep_last` and one.

    weights, moments: of an engine. memory: what a defence keeps beside the model. One process calls it. Raises
    UserError where it cannot be written, naming the last good checkpoint; then nothing is left of it.
    """
    target = folder / f"step-{state['step']:08d}"
    partial = folder / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_state(weights, partial / "weights.safetensors")
        save_state(moments, partial / "optimizer.safetensors")
        if memory is not None:
            save_state(memory, partial / "memory.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        manifest = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*partial.iterdir(), partial]:
            flush(path)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = checkpoints(folder)[-1:]
        raise UserError(
            f"checkpoint {target} could not be written ({error}); "
            f"{f'the last good one is {last[0]}' if last else 'there is none before it'}; make room and resume"
        ) from error
    kept = best_checkpoint(folder)
    for old in checkpoints(folder)[:-keep_last]:
        if old != kept:
            shutil.rmtree(old)
    return target


def mark_best(checkpoint: Path) -> None:
    """Keep `checkpoint`, and no longer the one that was marked before."""
    partial = checkpoint.parent / f".{BEST}.partial"
    partial.write_text(checkpoint.name)
    flush(partial)
    partial.replace(checkpoint.parent / BEST)


def best_checkpoint(folder: Path) -> Path | None:
    """The marked one; None where none is, or it is gone."""
    mark = folder / BEST
    found = folder / mark.read_text() if mark.is_file() else None
    return found if found is not None and found.is_dir() else None


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


def read_moments(path: Path) -> dict[str, Tensor]:
    """The optimiser's state, as an engine gave it."""
    return read_state(path / "optimizer.safetensors")


def read_memory(path: Path, memory: nn.Module) -> None:
    """Into `memory`, what a defence kept."""
    memory.load_state_dict(read_state(path / "memory.safetensors"))


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
