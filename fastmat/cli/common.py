"""What the commands share: arguments, output folders, names, progress."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from tqdm import tqdm

from fastmat.attacks.engine import Engine
from fastmat.build import Component, build_mlm, construct
from fastmat.cli.processes import is_first_process
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.models.weights import weights_hash
from fastmat.text.candidate_cache import CandidateCache
from fastmat.training import interrupt

if TYPE_CHECKING:
    from fastmat.text.mlm import MaskedLanguageModel


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after everything finished was saved; the message says what, and how to resume."""


@contextmanager
def keeping_rows(out: Path, name: str = "results.json") -> Iterator[None]:
    """For commands that write row by row, to `out/name`: Ctrl-C inside says whether there is anything to go on with."""
    try:
        yield
    except KeyboardInterrupt as error:
        file = out / name
        said = f"finished rows are in {file}; the same command with --resume goes on" if file.exists() else None
        raise Interrupted(said or "no row was finished, nothing was written") from error


@contextmanager
def going_on(out: Path) -> Iterator[None]:
    """For commands of several trainings: a stop inside says how to go on; SIGTERM, a scheduler's, is no error."""
    said = f"what is done is in {out}; the same command with --resume goes on"
    try:
        yield
    except interrupt.Interrupted as stopped:
        if stopped.asked_by != signal.SIGTERM:
            raise Interrupted(said) from stopped
        print(f"stopped; {said}")
    except KeyboardInterrupt as error:
        raise Interrupted(said) from error


def add_config_arguments(parser: argparse.ArgumentParser, *, resume: bool) -> None:
    """--config, key=value, --out and, where it can be, --resume."""
    parser.add_argument("settings", nargs="*", metavar="key=value", help="overrides, such as threat.eps=4/255")
    parser.add_argument("--config", metavar="NAME_OR_PATH", help="a config that ships with fastmat, or a YAML file")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="new folder for what is written")
    if resume:
        parser.add_argument("--resume", action="store_true", help="go on with what is in --out")


def check_out(out: Path, *, resume: bool, sign: str) -> None:
    """Raise UserError when `out` cannot be made, or would be written over, or `--resume` has nothing to go on with.

    sign: a file or folder that a run of the command leaves in `out`.
    """
    if not is_first_process():
        return  # the first process of a distributed run decides, and may have made the folder by now
    if out.is_file():
        raise UserError(f"--out {out} is a file; name a new folder")
    begun = (out / sign).exists()
    if resume and not begun:
        raise UserError(f"--resume: {out} has no {sign} to go on with; leave --resume out, and name a new folder")
    if not resume and out.is_dir() and any(out.iterdir()):
        hint = ", or add --resume" if begun else ""
        raise UserError(f"--out {out} exists and is not empty; name a new folder, remove it{hint}")
    above = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"--out {out} cannot be made: {above} is no folder that you may write to; name another")


def label_of(model: Component) -> str:
    """What tables call a model: its architecture or folder, else its name in the registry."""
    named = model.arguments.get("architecture") or model.arguments.get("path") or model.name
    return Path(str(named)).name


def fingerprint(model: VisionLanguageModel) -> str:
    """sha256 of a model's weights."""
    assert isinstance(model, nn.Module)
    return weights_hash(model)


def build_engine(arguments: Mapping[str, Any], device: torch.device) -> Engine:
    """How attacks are executed. Raises UserError for what `device` cannot do, before anything is written."""
    engine: Engine = construct(Engine, arguments, where="engine")
    if engine.cuda_graph and device.type != "cuda":
        raise UserError(f"engine: cuda_graph needs a CUDA device, this run is on {device}; leave cuda_graph off")
    return engine


class MlmLoader:
    """The masked language model of a run, loaded when an attack first asks for it."""

    def __init__(self, folder: str | None, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        self.loaded: MaskedLanguageModel | None = None

    def __call__(self) -> MaskedLanguageModel:
        if self.loaded is None:
            self.loaded = build_mlm(self.folder, device=self.device)
        return self.loaded

    @property
    def sha256(self) -> str | None:
        """Of its vocabulary and weights; None when nothing asked for it."""
        return None if self.loaded is None else self.loaded.fingerprint


def open_candidates(folder: Path | None) -> CandidateCache | None:
    """What masked language models have proposed, shared by all attacks of a run; None without a folder."""
    return None if folder is None else CandidateCache(folder=folder)


def tell_candidates(counts: Iterable[tuple[int, int]]) -> None:
    """Print how many captions were found in a cache of candidates, and how many were not. counts: of each process."""
    found, computed = map(sum, zip(*counts, strict=True))
    if found + computed:
        print(f"candidates: {found:,} captions found, {computed:,} computed")


def progress(total: int, what: str, *, unit: str = "pair") -> tqdm[NoReturn]:
    """A bar of captions with rate and remaining time; silent where nobody watches."""
    return tqdm(total=total, desc=what, unit=unit, disable=None if is_first_process() else True, dynamic_ncols=True)
