"""What the processes of a run tell each other: their shares of a batch, features, decisions and mistakes.

Every method is called by all processes, in the same order. Alone, each gives back what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastmat.defences.base import Everyone, Features
from fastmat.errors import UserError
from fastmat.types import AttackContext, Batch

T = TypeVar("T")


class PeerLost(Exception):
    """Another process ended in the middle of a step."""


@dataclass(frozen=True, kw_only=True)
class Peers:
    """rank: of this process, out of `world`. device: where it computes, and what is exchanged lies."""

    rank: int
    world: int
    device: torch.device

    def agreed(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all of them; its UserError as well."""
        made: list[Any] = [None]
        if self.rank == 0:
            try:
                made = [make()]
            except UserError as error:
                made = [error]
        if self.world > 1:
            dist.broadcast_object_list(made, src=0, device=self.device)
        if isinstance(made[0], UserError):
            raise made[0]
        value: T = made[0]
        return value

    def mean(self, values: Sequence[Tensor | float]) -> list[float]:
        """The means over the processes, on the host: the one place where a step waits for the device."""
        row = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device).detach() for v in values])
        if self.world > 1:
            dist.all_reduce(row)
            row /= self.world
        means: list[float] = row.tolist()
        return means

    def shared(self, fetch: Callable[[], Batch]) -> tuple[Batch, tuple[int, ...]]:
        """This process's share of a batch, and how many texts each process has, by rank.

        Exchanged before anything of a step is computed, so nothing waits. Raises UserError in every process where one
        meets it, or where the shares hold different numbers of images.
        """
        error: UserError | None = None
        images = texts = 0
        try:
            batch = fetch()
            images, texts = len(batch), len(batch.texts)
        except UserError as met:
            error = met
        if self.world > 1:
            every = self._stacked(torch.tensor([images, texts, error is not None], device=self.device)).tolist()
            if any(failed for *_, failed in every):
                raise UserError(self._first_sentence(error))
            counts = [count for count, *_ in every]
            if len(set(counts)) > 1:
                raise UserError(
                    f"the processes have {', '.join(map(str, counts))} images of one batch; all must have equally many"
                )
            return batch, tuple(count for _, count, _ in every)
        if error is not None:
            raise error
        return batch, (texts,)

    def joined(self, features: Features, texts: tuple[int, ...]) -> Features:
        """`features` with the views of all processes beside them, gathered when a loss first asks for them.

        texts: from `shared`. One collective for all views and one for the groups; gradients come back through it.
        """
        if self.world == 1:
            return features
        return replace(features, everyone=cache(lambda: self._everyone(features, texts)))

    def context(self, context: AttackContext, *, texts: tuple[int, ...]) -> AttackContext:
        """The frozen features that an inner attack contrasts with, of all processes. texts: from `shared`."""
        lengths = [(len(context.image_group),) * self.world, texts]
        features = self._stacked(padded([context.image_features, context.text_features], lengths))
        groups = self._stacked(padded([context.image_group, context.text_group], lengths))
        image_features, text_features = unpadded(features, lengths)
        image_group, text_group = unpadded(groups, lengths)
        return AttackContext(
            image_features=image_features,
            image_group=image_group,
            text_features=text_features,
            text_group=text_group,
        )

    def rows(self, parts: Sequence[Tensor], lengths: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Each part of all processes, by rank, in one collective; gradients come back through it.

        lengths: of every part, how long it is in each process.
        """
        return unpadded(Gather.apply(padded(parts, lengths), self), lengths)

    def _everyone(self, features: Features, texts: tuple[int, ...]) -> Everyone:
        images = (len(features.group),) * self.world
        lengths = [images] * len(features.images) + [texts] * len(features.texts)
        rows = [view.features for views in (features.images, features.texts) for view in views.values()]
        parts = iter(self.rows(rows, lengths))
        groups = padded([features.group, features.text_group], [images, texts])
        group, text_group = unpadded(self._stacked(groups), [images, texts])
        return Everyone(
            images={name: next(parts) for name in features.images},
            texts={name: next(parts) for name in features.texts},
            group=group,
            text_group=text_group,
        )

    def _stacked(self, tensor: Tensor) -> Tensor:
        """[n, ...] of every process as [world, n, ...]."""
        every = tensor.new_empty(self.world, *tensor.shape)
        dist.all_gather_into_tensor(every.flatten(0, 1), tensor.contiguous())
        return every

    def _first_sentence(self, error: UserError | None) -> str:
        said: list[Any] = [None] * self.world
        dist.all_gather_object(said, None if error is None else str(error))
        return next(sentence for sentence in said if sentence is not None)


class Gather(torch.autograd.Function):
    """[n, ...] of every process as [world, n, ...]; each gets back the sum of all gradients of its rows, in fp32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return peers._stacked(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        every = grad.float().flatten(0, 1).contiguous()
        own = every.new_empty(grad.shape[1:])
        dist.reduce_scatter_tensor(own, every)
        return own.to(grad.dtype), None


def padded(parts: Sequence[Tensor], lengths: Sequence[tuple[int, ...]]) -> Tensor:
    """The parts one below the other, each as long as the longest of any process."""
    grown = []
    for part, by_rank in zip(parts, lengths, strict=True):
        missing = max(by_rank) - len(part)
        grown.append(torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part)
    return torch.cat(grown)


def unpadded(stacked: Tensor, lengths: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The parts of all processes, by rank, out of [world, n, ...]; the inverse of `padded`."""
    blocks = stacked.split([max(by_rank) for by_rank in lengths], dim=1)
    return [
        torch.cat([rows[:length] for rows, length in zip(block, by_rank, strict=True)])
        for block, by_rank in zip(blocks, lengths, strict=True)
    ]


@contextmanager
def noticing_loss() -> Iterator[None]:
    """Inside, a broken connection raises PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
            raise PeerLost("another process of this run ended") from error
        raise
