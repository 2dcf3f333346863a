"""Token embeddings moved by a given tensor: how an attack or a defence works in embedding space."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fastmat.errors import UserError


@contextmanager
def shifted(table: nn.Embedding | None, shift: Tensor | None) -> Iterator[None]:
    """Inside, what `table` looks up is moved by `shift` [T, L, D], with gradients to both; None: as it is.

    Raises UserError where the text tower hides its table.
    """
    if shift is None:
        yield
        return
    if table is None:
        raise UserError("this text tower hides its token embeddings, so they cannot be perturbed; substitute words")

    def move(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + shift.to(output.dtype)

    handle = table.register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()
