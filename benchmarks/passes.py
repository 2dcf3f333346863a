"""Kernels and memory passes of a piece of PyTorch code, counted from what it dispatches.

A kernel is one dispatched operator that is neither a view nor the reading of a number by the host.
A pass is one reading or one writing of as many bytes as the image batch has. Only tensors with at least as many
elements as the batch count, each in full and by its bytes: a boolean mask of an fp32 batch is a quarter of a pass. An
operator reads every such argument once, except where it overwrites it (`copy_`, `zero_`, `out=`) or only looks at its
shape (`zeros_like`), and writes every such result and every argument that it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OVERWRITE = {"copy_", "zero_", "fill_", "index_put_", "uniform_", "normal_"}
READ_BY_HOST = torch.ops.aten._local_scalar_dense.default


class Count(NamedTuple):
    kernels: int
    passes: float


class PassCounter(TorchDispatchMode):
    """Counts while it is entered; `images` says what one pass is."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.numel = images.numel()
        self.bytes = images.numel() * images.element_size()
        self.kernels = 0
        self.moved = 0

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        if any(value.alias_info and not value.alias_info.is_write for value in schema.returns) or func is READ_BY_HOST:
            return result
        self.kernels += 1
        name = schema.name.removeprefix("aten::")
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | dict(kwargs)
        for argument in schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            read = not (name.endswith("_like") or (written and (name in OVERWRITE or argument.name == "out")))
            self.moved += (read + written) * self.large(given.get(argument.name))
        for value, out in zip(schema.returns, result if isinstance(result, tuple) else (result,), strict=True):
            if value.alias_info is None:
                self.moved += self.large(out)
        return result

    def large(self, value: object) -> int:
        """Bytes of the tensors in an argument or result that are as large as the batch."""
        return sum(t.numel() * t.element_size() for t in tensors(value) if t.numel() >= self.numel)


def tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def count_passes(images: Tensor, code: Callable[[], object]) -> Count:
    """What one call of `code` dispatches.

    >>> x = torch.rand(2, 3, 8, 8)
    >>> count_passes(x, lambda: x.sign() * 0.1)
    Count(kernels=2, passes=4.0)
    """
    with PassCounter(images) as counter:
        code()
    return Count(counter.kernels, counter.moved / counter.bytes)
