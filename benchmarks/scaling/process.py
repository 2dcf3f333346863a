"""Run by torchrun: MAT steps of a small CLIP in real gloo processes, every collective written down.

Calls are seen where all of them pass, at PyTorch's dispatcher (`c10d::*`), so the C++ reducer of DDP and DeepSpeed's
own wrappers are seen alike. Rank 0 writes the record; nothing here is predicted.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmat.benchmarks.scaling.small import BATCH, PGD_STEPS, SMALL, TEXT_CALLS, build
from fastmat.benchmarks.scaling.strategies import STRATEGIES, Strategy

STEPS = 5  # the first ones differ: DDP re-orders its buckets, ZeRO-3 records the order of modules
SCALAR = 64  # bytes; norms, flags and counts are no traffic
KINDS = {
    "c10d::allreduce_": "all_reduce",
    "c10d::allgather_": "all_gather",
    "c10d::_allgather_base_": "all_gather",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::broadcast_": "broadcast",
    "c10d::reduce_": "reduce",
}


class Tape(TorchDispatchMode):
    """Collectives under this mode: kind and bytes of the whole tensor, which is the larger of input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if func.namespace == "c10d":
            size = max(map(bytes_of, args), default=0)
            if size > SCALAR:
                self.calls.append((KINDS.get(name, name), size))
        return func(*args, **(kwargs or {}))


def bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(bytes_of, value)) if isinstance(value, list | tuple) else 0


class Gather(torch.autograd.Function):
    """[B, D] of this process to [N, D] of all; backward sums every process's gradient of these rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0] * dist.get_world_size(), rows.shape[1])
        dist.all_gather_into_tensor(out, rows.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        out = grad.new_empty(grad.shape[0] // dist.get_world_size(), grad.shape[1])
        dist.reduce_scatter_tensor(out, grad)
        return out


def engine_for(name: str, model: nn.Module) -> tuple[nn.Module, Callable[[Tensor], None], Callable[[], None]]:
    """The wrapped module, its backward and its step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    strategy = STRATEGIES[name]
    if strategy.stage == 0:
        dist.init_process_group("gloo")
        wrapped = nn.parallel.DistributedDataParallel(model)

        def update() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return wrapped, lambda loss: loss.backward(), update
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    zero: dict[str, Any] = {"stage": strategy.stage}
    if strategy.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # small weights are sharded too
    if strategy.gathers == "pass":
        zero |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "train_batch_size": BATCH * dist.get_world_size(),
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, engine.backward, engine.step


@contextmanager
def attacked(strategy: Strategy, module: nn.Module) -> Iterator[nn.Module]:
    """The module that the inner attack runs through, frozen."""
    module.requires_grad_(False)
    if strategy.gathers == "step":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            replica = build(SMALL).requires_grad_(False)
            for own, whole in zip(replica.parameters(), module.parameters(), strict=True):
                own.data = whole.data
            yield replica
    else:
        yield module
    module.requires_grad_(True)


def mat_step(
    strategy: Strategy,
    wrapped: nn.Module,
    backward: Callable[[Tensor], None],
    update: Callable[[], None],
    images: Tensor,
    ids: Tensor,
) -> None:
    """Guide, text encodings, PGD through the unwrapped module, then the outer update over the global batch."""
    with attacked(strategy, wrapped.module) as inner:
        with torch.no_grad():
            inner(images, None)
            for _ in range(TEXT_CALLS):
                texts = inner(None, ids)[1]
        x = images
        for _ in range(PGD_STEPS):
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((inner(x, None)[0] * texts).sum(), x)
            x = x + gradient.sign() / 255
    image, text, scale = wrapped(x.detach(), ids)
    every = Gather.apply(torch.cat([image, text])).view(dist.get_world_size(), 2, BATCH, -1)
    groups = torch.empty(2 * BATCH * dist.get_world_size(), dtype=torch.int64)
    dist.all_gather_into_tensor(groups, torch.arange(2 * BATCH))
    own = torch.arange(BATCH) + BATCH * dist.get_rank()
    rows = nn.functional.cross_entropy(scale * image @ every[:, 1].flatten(0, 1).T, own)
    columns = nn.functional.cross_entropy(scale * text @ every[:, 0].flatten(0, 1).T, own)
    backward((rows + columns) / 2)
    update()


def loopback() -> int | None:
    """Bytes sent so far on this network namespace's loopback, headers included; None where nothing counts them."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return None
    found = [line.split(":")[1].split() for line in lines if line.strip().startswith("lo:")]
    return int(found[0][8]) if found else None


def main() -> None:
    name, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    wrapped, backward, update = engine_for(name, build(SMALL))
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)

    images = torch.rand(BATCH, 3, SMALL.image.side, SMALL.image.side, generator=generator)
    ids = torch.randint(1, SMALL.text.vocabulary, (BATCH, SMALL.text.tokens), generator=generator)
    steps, seconds, sent = [], [], []
    for _ in range(STEPS):
        dist.barrier()
        before, start = loopback(), time.perf_counter()
        with Tape() as tape:
            mat_step(STRATEGIES[name], wrapped, backward, update, images, ids)
        seconds.append(time.perf_counter() - start)
        dist.barrier()
        after = loopback()
        sent.append(None if before is None or after is None else after - before)
        steps.append(tape.calls)
    if rank == 0:
        out.write_text(json.dumps({"steps": steps, "seconds": seconds, "sent": sent}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
