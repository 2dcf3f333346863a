"""argparse as the commands use it: one sentence per mistake, and a command's config keys under its help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from fastmat.errors import UserError


class Parser(argparse.ArgumentParser):
    """keys: writes the help of the config keys; called only for --help, since it loads everything that it lists."""

    keys: Callable[[], str] | None = None

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self.keys()}\n" if self.keys else "")
