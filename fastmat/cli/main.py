"""`fastmat COMMAND ...`: one line of help per command, one sentence per mistake.

Exit codes: 0 done, 2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from fastmat.cli.parser import Parser
from fastmat.cli.processes import is_first_process
from fastmat.errors import UserError

COMMANDS = {
    "quickstart": "attack, harden, evaluate and report on built-in data, in minutes and without a download",
    "attack": "write a set of adversarial images and captions",
    "candidates": "compute once what the masked language model proposes, for every later attack",
    "pack": "write a set as WebDataset shards, which training streams",
    "augment": "write an augmented set, with more captions or images, or measure one",
    "train": "harden a model, or fine-tune it",
    "eval": "rank images and captions, clean and attacked; write results.json and report.html",
    "task": "judge grounding, captioning or entailment, clean and attacked",
    "export": "write a model for open_clip or transformers, or an adversarial set as PNG files",
    "report": "draw report.html again from a results folder",
    "study": "train and attack many models to answer a question; table, plots, page",
    "bench": "measure operators and attacks beside what others do; rows, plots, targets",
    "env": "show versions and devices",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            quiet()
        try:
            return run(words)
        except UserError as error:
            say(str(error))
            return 2
        except OSError as error:
            said = f"{error.filename}: {error.strerror}; check the path and its permissions"
            say(said if error.filename and error.strerror else str(error))
            return 2
        except KeyboardInterrupt as error:
            say(f"interrupted; {error or 'nothing more was written'}")
            return 130


def say(sentence: str) -> None:
    """On standard error, once."""
    if is_first_process():
        print(f"fastmat: {sentence}", file=sys.stderr)


class Warnings(logging.Handler):
    """One line for each."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"fastmat: warning: {record.getMessage()}", file=sys.stderr)


def run(words: Sequence[str]) -> int:
    """Find the command, import only it, and run it."""
    listing = "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="fastmat",
        usage="fastmat COMMAND ... (fastmat COMMAND --help explains one)",
        description=f"Attack and harden vision-language models.\n\ncommands:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="one of the above")
    if not words:
        parser.print_help()
        return 2
    command = parser.parse_args(words[:1]).command
    module = import_module(f"fastmat.cli.{command}")
    parser = Parser(
        prog=f"fastmat {command}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    module.run(parser.parse_intermixed_args(words[1:]))  # overrides may stand before and after options
    return 0


def quiet() -> None:
    """What libraries say to developers is no news to a user; fastmat's own warnings are one line each."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"fastmat\.")
    warnings.showwarning = lambda message, *_: print(f"fastmat: warning: {message}", file=sys.stderr)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger().setLevel(logging.ERROR)
    own = logging.getLogger("fastmat")  # as that memory ran out and less is done at once
    own.setLevel(logging.WARNING)
    if not own.handlers:
        own.addHandler(Warnings())
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())
