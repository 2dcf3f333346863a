"""Real processes beside the prediction: what their collectives carry, what crosses the loopback, how long a step is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from fastmat.benchmarks.scaling.small import BATCH, SMALL
from fastmat.benchmarks.scaling.strategies import STRATEGIES
from fastmat.benchmarks.scaling.traffic import Exchange, exchanges, sent
from fastmat.benchmarks.scaling.work import Texts
from fastmat.benchmarks.suite import HERE, commit_of, machine_of
from fastmat.errors import UserError

TIME_LIMIT = 300  # seconds; DeepSpeed builds a small library at its first run
# lo is down in a fresh network namespace
NAMESPACE = ("unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")


@dataclass(frozen=True, kw_only=True)
class Observed:
    """One strategy with some processes, a step after the first ones.

    carried, expected: bytes of the whole tensors by kind of collective, seen and predicted. crossed: bytes that all
    processes together put on the wire, with TCP's own, None where that could not be seen; crossing: predicted.
    seconds: the fastest step; cores: that the processes shared.
    """

    time: str
    strategy: str
    processes: int
    carried: Mapping[str, int]
    expected: Mapping[str, int]
    crossed: int | None
    crossing: int
    seconds: float
    cores: int
    machine: str
    versions: Mapping[str, str]
    commit: str | None
    command: str


def observe(strategy: str, processes: int, *, command: str) -> Observed:
    """Run `process.py` in real processes. Raises UserError with the end of their output where they fail."""
    record, alone = run(strategy, processes)
    found = exchanges(SMALL, "mat", STRATEGIES[strategy], Texts(), batch=BATCH, gpus=processes)
    crossed = min(record["sent"][1:]) if alone else None
    libraries = ("torch", "deepspeed", "open_clip_torch")
    return Observed(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        strategy=strategy,
        processes=processes,
        carried=by_kind(record["steps"][-1]),
        expected=by_kind([(one.kind, one.size) for one in found]),
        crossed=crossed,
        crossing=round(sum(crossing(one, processes) for one in found)),
        seconds=min(record["seconds"][1:]),
        cores=len(os.sched_getaffinity(0)),
        machine=machine_of(torch.device("cpu")),
        versions={name: metadata.version(name) for name in libraries},
        commit=commit_of(HERE),
        command=command,
    )


def crossing(exchange: Exchange, processes: int) -> float:
    return sent(exchange, processes, gloo=True) * processes


def by_kind(calls: list[tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for kind, size in calls:
        found[kind] = found.get(kind, 0) + size
    return dict(sorted(found.items()))


def run(strategy: str, processes: int) -> tuple[dict, bool]:
    """The record of rank 0, and whether the processes had a network of their own, so that its bytes are theirs."""
    alone = own_network()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        what = f"{processes} process{'es' if processes > 1 else ''} of {strategy}"
        try:
            done = subprocess.run(
                [*(NAMESPACE if alone else ()), *launcher, "-m", "fastmat.benchmarks.scaling.process", strategy, out],
                env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"{what} took more than {TIME_LIMIT} s; measure on a quieter machine") from None
        if done.returncode:
            raise UserError(f"{what} ended with status {done.returncode}: {done.stderr[-2000:]}")
        return json.loads(out.read_text()), alone


def own_network() -> bool:
    """Whether this system lets a user have a network namespace."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
