"""Which implementation of an operator runs: the Triton kernel or the PyTorch reference."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from fastmat.errors import UserError, nearest

Backend = Literal["auto", "triton", "reference"]
ENVIRONMENT = "FASTMAT_BACKEND"
log = logging.getLogger(__name__)


def uses_triton(backend: str | None, device: torch.device) -> bool:
    """Whether the kernel of an operator runs for tensors on `device`.

    backend: "triton", "reference" or "auto" (CUDA: the kernel, elsewhere the reference); None: the environment variable
        FASTMAT_BACKEND, else "auto". Every distinct choice is logged once, at level INFO, with its reason.
    Raises ValueError for another name, and for "triton" where no kernel can run.

    Operators call it when they run, not when they are traced, so a compiled program still obeys the variable.
    """
    asked = backend or os.environ.get(ENVIRONMENT) or "auto"
    source = "the argument backend" if backend else f"${ENVIRONMENT}" if os.environ.get(ENVIRONMENT) else "the default"
    if asked not in get_args(Backend):
        raise UserError(f"{source} names no backend: {asked!r}{nearest(asked, get_args(Backend))}")
    return _choose(asked, source, device.type)


@cache
def _choose(asked: str, source: str, device: str) -> bool:
    problem = _why_no_kernel(device)
    if asked == "triton" and problem:
        raise UserError(f"{source} asks for Triton kernels, but {problem}")
    # The interpreter is for tests: on a CPU it runs only when asked for by name.
    triton = asked == "triton" or (asked == "auto" and device == "cuda" and not problem)
    reason = f"{source} is {asked!r}" + (f", tensors are on {device}" if asked == "auto" else "")
    if asked == "auto" and device == "cuda" and problem:
        reason += f", but {problem}"
    log.info("fastmat.ops runs %s: %s", "Triton kernels" if triton else "the PyTorch reference", reason)
    return triton


def _why_no_kernel(device: str) -> str | None:
    """A reason why no Triton kernel can run on tensors of this device type, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors are on {device}: move them to CUDA, or set TRITON_INTERPRET=1 before Python starts to test"
    return None
