"""Seconds, pairs and efficiency of a step, from work, memory and traffic on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fastmat.benchmarks.scaling.cluster import H200, Cluster
from fastmat.benchmarks.scaling.memory import FP32, Memory, memory_of
from fastmat.benchmarks.scaling.shapes import MODELS
from fastmat.benchmarks.scaling.strategies import STRATEGIES
from fastmat.benchmarks.scaling.traffic import exchanges, sent
from fastmat.benchmarks.scaling.work import METHODS, StepFlops, Texts, step_flops, trained_parameters

GPUS = (1, 8, 64, 512)
BATCH = {"clip-vit-b16": 128, "albef": 32, "blip": 32}  # pairs of one GPU; ALBEF's and BLIP's are the published ones
HIDDEN_BEHIND = {"gradients": "backward", "weights": "forward", "attack": "inner"}  # others are waited for


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One line of the table. batch: pairs of one GPU, the same for any number of GPUs (weak scaling)."""

    model: str
    method: str
    strategy: str
    gpus: int
    batch: int
    checkpointing: bool = False
    micro_batch: int | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """sent: bytes from each GPU a step; calls: collectives. Seconds: compute, update (optimiser and averages, bound by
    memory), exchange (all collectives, one after the other), exposed (what no computing hides)."""

    flops: StepFlops
    memory: Memory
    sent: float
    calls: int
    compute: float
    update: float
    exchange: float
    exposed: float

    @property
    def step(self) -> float:
        """Seconds where collectives run behind the computing they can run behind."""
        return self.compute + self.update + self.exposed

    def pairs_that_fit(self, setup: Setup, cluster: Cluster = H200) -> int:
        """Pairs of one GPU whose activations find room beside the state, a tenth of the memory left free."""
        room = 0.9 * cluster.memory - self.memory.state
        return int(room / (max(self.memory.inner, self.memory.outer) / setup.batch))

    @property
    def serial(self) -> float:
        """Seconds where nothing overlaps: the bound from the other side."""
        return self.compute + self.update + self.exchange


def predict(setup: Setup, cluster: Cluster = H200, texts: Texts | None = None) -> Prediction:
    """Raises KeyError for a model or strategy that is not in the tables."""
    texts = texts or Texts()
    model, strategy = MODELS[setup.model], STRATEGIES[setup.strategy]
    cached = setup.micro_batch is not None and setup.micro_batch < setup.batch
    flops = step_flops(
        model,
        setup.method,
        texts,
        batch=setup.batch,
        gpus=setup.gpus,
        checkpointing=setup.checkpointing,
        cached=cached,
    )
    memory = memory_of(
        model,
        setup.method,
        strategy,
        texts,
        batch=setup.batch,
        gpus=setup.gpus,
        checkpointing=setup.checkpointing,
        micro_batch=setup.micro_batch,
    )
    rate = cluster.peak * cluster.achievable
    windows = {name: getattr(flops, name) / rate for name in ("inner", "forward", "backward")}
    if strategy.gathers == "step":
        windows["inner"] = 0.0  # the whole model is there before the attack begins

    trained = trained_parameters(setup.method, model)
    # AdamW reads weights, gradients and both moments and writes all but the gradients; the norm reads gradients again.
    touched = 8 * FP32 * trained / (setup.gpus if strategy.stage else 1)
    touched += 3 * FP32 * model.momentum_parameters * (setup.method != "fare")
    update = touched / (cluster.bandwidth * cluster.moved)

    moved = exchange = exposed = 0.0
    calls = 0
    if setup.gpus > 1:
        for one in exchanges(model, setup.method, strategy, texts, batch=setup.batch, gpus=setup.gpus):
            own = sent(one, setup.gpus)
            seconds = cluster.collective(own, one.calls, setup.gpus)
            moved, calls, exchange = moved + own, calls + one.calls, exchange + seconds
            window = windows.get(HIDDEN_BEHIND.get(one.what, ""), 0.0)
            exposed += max(seconds - window, seconds / one.calls)  # one part has nothing left to hide behind
    return Prediction(
        flops=flops,
        memory=memory,
        sent=moved,
        calls=calls,
        compute=flops.total / rate,
        update=update,
        exchange=exchange,
        exposed=exposed,
    )


def efficiency(setup: Setup, *, serial: bool = False, cluster: Cluster = H200) -> float:
    """Speed per GPU over that of one GPU with DDP's whole state, the batch per GPU being the same."""
    alone = predict(replace(setup, gpus=1, strategy="ddp"), cluster)
    here = predict(setup, cluster)
    return alone.step / (here.serial if serial else here.step)


def setups() -> Iterator[Setup]:
    """MAT under every strategy and number of GPUs, every method with DDP, and what saves memory on one GPU."""
    for model, batch in BATCH.items():
        for method in METHODS:
            for strategy in STRATEGIES if method == "mat" else ("ddp",):
                for gpus in GPUS:
                    yield Setup(model=model, method=method, strategy=strategy, gpus=gpus, batch=batch)
        plain = Setup(model=model, method="mat", strategy="ddp", gpus=1, batch=batch)
        yield replace(plain, checkpointing=True)
        yield replace(plain, micro_batch=batch // 4)
