"""The collectives of a step, and the bytes that each process sends for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastmat.benchmarks.scaling.shapes import Model
from fastmat.benchmarks.scaling.strategies import Strategy
from fastmat.benchmarks.scaling.work import Passes, Texts, passes_of, trained_parameters

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
FP32, INT64 = 4, 8
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes of DDP's gradient buckets, torch's defaults
REDUCED, PREFETCHED = 500_000_000 * FP32, 50_000_000 * FP32  # bytes of DeepSpeed's, its defaults


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """size: bytes of the whole tensors, whoever holds them, in `calls` calls. what: "gradients", "weights" (outer),
    "attack" (weights for the inner attack), "updated" (weights after the step), "features" or "buffers"."""

    what: str
    kind: Kind
    size: int
    calls: int


def exchanges(model: Model, method: str, strategy: Strategy, texts: Texts, *, batch: int, gpus: int) -> list[Exchange]:
    """All of a step but the scalars (norm, losses). batch: pairs of one process."""
    trained = trained_parameters(method, model) * FP32
    found = list(feature_exchanges(model, method, rows=2 * batch * gpus))
    if strategy.stage == 0:
        buckets = 1 + math.ceil(max(0, trained - FIRST_BUCKET) / BUCKET)
        found.append(Exchange(what="gradients", kind="all_reduce", size=trained, calls=buckets))
        if model.buffers and method != "fare":
            found.append(Exchange(what="buffers", kind="broadcast", size=model.buffers, calls=1))
    elif strategy.stage < 3:
        # DeepSpeed reduces whole buckets everywhere and keeps its part (`use_multi_rank_bucket_allreduce`).
        calls = math.ceil(trained / REDUCED)
        found.append(Exchange(what="gradients", kind="all_reduce", size=trained, calls=calls))
        found.append(Exchange(what="updated", kind="all_gather", size=trained, calls=calls))
    else:
        found.append(
            Exchange(what="gradients", kind="reduce_scatter", size=trained, calls=math.ceil(trained / REDUCED))
        )
        found += weight_gathers(model, passes_of(method, model, texts), strategy)
    return found


def feature_exchanges(model: Model, method: str, *, rows: int) -> list[Exchange]:
    """Contrasting over the global batch: unit features gathered with their gradients scattered back, and the groups.

    rows: images and texts of all processes.
    """
    if method == "fare":
        return []
    features = rows * model.embed * FP32
    gathered = features * 2 if model.queue else features  # momentum features enter the queues of all
    return [
        Exchange(what="features", kind="all_gather", size=gathered + rows * INT64, calls=3 if model.queue else 2),
        Exchange(what="features", kind="reduce_scatter", size=features, calls=1),
    ]


def weight_gathers(model: Model, passes: dict[str, Passes], strategy: Strategy) -> list[Exchange]:
    """Stage 3: weights made whole for the attack and for the outer update."""
    towers = {"image": model.image, "text": model.text, "fusion": model.fusion}
    inner = outer = 0
    for name, own in passes.items():
        tower = towers.get(name)
        if tower is not None:  # teacher and momentum copies are whole everywhere
            inner += (own.calls + 2 * own.attacked) * tower.parameters
            outer += 2 * bool(own.trained) * tower.parameters
    if strategy.gathers == "step":
        whole = model.parameters
        inner, outer = whole if inner else 0, whole
    return [
        Exchange(what=what, kind="all_gather", size=number * FP32, calls=math.ceil(number * FP32 / PREFETCHED))
        for what, number in (("attack", inner), ("weights", outer))
        if number
    ]


def sent(exchange: Exchange, gpus: int, *, gloo: bool = False) -> float:
    """Bytes that a process sends, the mean over processes, by ring (Thakur, Rabenseifner, Gropp, IJHPCA 2005).

    gloo: torch's gloo backend runs a reduce-scatter as an all-reduce.
    """
    twice = exchange.kind == "all_reduce" or (gloo and exchange.kind == "reduce_scatter")
    return (2 if twice else 1) * (gpus - 1) / gpus * exchange.size
