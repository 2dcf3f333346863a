"""What the commands share: arguments, output folders, names, progress."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from torch import nn
from tqdm import tqdm

from fastmat.build import Component
from fastmat.errors import UserError
from fastmat.evaluation.evaluate import Attacked
from fastmat.evaluation.manifest import model_fingerprint
from fastmat.models.protocol import VisionLanguageModel


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after everything finished was saved; the message says what, and how to resume."""


def add_config_arguments(parser: argparse.ArgumentParser, *, resume: bool) -> None:
    """CONFIG, key=value, --config, --out and, where it can be, --resume."""
    parser.add_argument(
        "settings", nargs="*", metavar="CONFIG | key=value", help="a config and overrides, in any order"
    )
    parser.add_argument("--config", metavar="NAME_OR_PATH", help="a config that ships with fastmat, or a YAML file")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="new folder for what is written")
    if resume:
        parser.add_argument("--resume", action="store_true", help="go on with what is in --out")


def split_settings(arguments: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The config's name or path, and the overrides."""
    names = [text for text in arguments.settings if "=" not in text]
    if arguments.config is not None:
        names.append(arguments.config)
    if len(names) > 1:
        raise UserError(f"one config, please; got {', '.join(names)}")
    return (names[0] if names else None), [text for text in arguments.settings if "=" in text]


def check_out(out: Path, *, resume: bool = False) -> None:
    """Raise UserError when writing to `out` would write over something, or `--resume` has nothing to go on with."""
    if os.environ.get("RANK", "0") != "0":
        return  # the first process of a distributed run decides, and may have made the folder by now
    if out.is_file():
        raise UserError(f"--out {out} is a file; name a new folder")
    filled = out.is_dir() and any(out.iterdir())
    if filled and not resume:
        raise UserError(f"--out {out} exists and is not empty; name a new folder, remove it, or add --resume")
    if resume and not filled:
        raise UserError(f"--resume: {out} holds nothing to go on with; leave --resume out")


def label_of(model: Component) -> str:
    """What tables call a model: its architecture or folder, else its name in the registry."""
    named = model.arguments.get("architecture") or model.arguments.get("path") or model.name
    return Path(str(named)).name


def fingerprint(model: VisionLanguageModel) -> str:
    """sha256 of a model's weights."""
    assert isinstance(model, nn.Module)
    return model_fingerprint(model)


def progress(total: int, what: str) -> tqdm[NoReturn]:
    """A bar of captions with rate and remaining time; silent where nobody watches."""
    return tqdm(total=total, desc=what, unit="pair", disable=None, dynamic_ncols=True)


def counted(attacked: Iterable[Attacked], bar: tqdm[NoReturn]) -> Iterator[Attacked]:
    """The same, moving the bar by the captions of each batch."""
    for part in attacked:
        bar.update(len(part.sources))
        yield part
