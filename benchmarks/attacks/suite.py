"""All chosen attacks: gate, counts, memory, then rounds in which every implementation runs once, in rotating order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmat.attacks.draws import Draws, SeededDraws
from fastmat.benchmarks.attacks.draws import DeviceDraws, HostDraws
from fastmat.benchmarks.attacks.gate import compare
from fastmat.benchmarks.attacks.job import Dtype, Half, Job, Opponent, Outcome, Runner
from fastmat.benchmarks.attacks.meter import Meter, with_host_syncs
from fastmat.benchmarks.attacks.peer import Peer
from fastmat.benchmarks.attacks.rows import AttackRow
from fastmat.benchmarks.attacks.setting import Setting
from fastmat.benchmarks.harness import QualityError, Timer
from fastmat.benchmarks.rows import append_rows
from fastmat.benchmarks.suite import HERE, LIBRARIES, commit_of, machine_of, versions_of

WHO: tuple[tuple[Opponent, Dtype], ...] = (
    ("fastmat", "float32"),
    ("cold", "float32"),
    ("published", "float32"),
    ("tuned", "float32"),
    ("fastmat", "bfloat16"),
    ("cold", "bfloat16"),
    ("tuned", "bfloat16"),
)
SEED = 0
Memory = Callable[[str, Opponent, Dtype], int | None]


@dataclass(kw_only=True)
class Measured:
    """One implementation, while it is measured."""

    who: Opponent
    dtype: Dtype
    runner: Runner
    draws: Draws
    outcome: Outcome
    syncs: int
    quality: dict[str, float] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)
    peak: int | None = None
    times: list[float] = field(default_factory=list)


def jobs_of(name: str, setting: Setting) -> list[Job]:
    """An attack on the whole batch; PGD on a single image as well."""
    module = import_module(f"fastmat.benchmarks.attacks.{name}")
    return [module.job(setting), module.job(setting, images=1)] if name == "pgd" else [module.job(setting)]


def measure(
    setting: Setting,
    job: Job,
    half: Half,
    *,
    seconds: float,
    min_rounds: int,
    memory: Memory | None,
    peer: Peer | None = None,
) -> tuple[list[Measured], list[float], list[QualityError]]:
    """Gate, counts, peaks, then at least `min_rounds` rounds for about `seconds`; also a peer's seconds, by round.

    The last list is of those in bf16 that attack differently: they are not timed. Raises QualityError when one in fp32
    does; nothing is timed then.
    """
    own: dict[Opponent, Draws] = {
        "fastmat": SeededDraws(SEED),
        "cold": SeededDraws(SEED),
        "published": HostDraws(SEED),
        "tuned": DeviceDraws(setting.device, SEED),
    }
    measured: list[Measured] = []
    refused: list[QualityError] = []
    on_words = job.threat_of(half).max_words > 0
    for who, dtype in sorted(WHO, key=lambda pair: pair[0] != "published"):  # the reference first
        if who == "cold" and not on_words:
            continue
        runner = job.runner(setting, who, dtype, half)
        outcome, syncs = with_host_syncs(lambda runner=runner: runner(SeededDraws(SEED)), setting.device)
        one = Measured(who=who, dtype=dtype, runner=runner, draws=own[who], outcome=outcome, syncs=syncs)
        published = measured[0].outcome if measured else outcome
        try:
            one.quality = compare(setting, job, half, dtype, who, outcome, published)
        except QualityError as error:
            if dtype == "float32":
                raise
            refused.append(error)
        else:
            measured.append(one)
    if (trace := measured[0].outcome.trace) is not None:
        tried, options = sum(trace.tried), sum(trace.options)
        measured[0].quality |= {"words": float(np.mean(trace.words)), "words_tried": tried / len(trace.tried)}
        measured[0].quality["candidates"] = options / max(1, tried)
    for one in measured:
        count(setting, one)
        if memory is not None and half == "both":
            one.peak = memory(job.name, one.who, one.dtype)
    timer = Timer(setting.device)
    theirs: list[float] = []
    begun, rounds = time.perf_counter(), 0
    while rounds < min_rounds or (time.perf_counter() - begun < seconds and rounds < 1000):
        first = rounds % len(measured)
        for one in (*measured[first:], *measured[:first]):
            one.times.append(timer(lambda one=one: one.runner(one.draws)))
        if peer is not None:
            theirs.append(peer.round())
        rounds += 1
    return measured, theirs, refused


def count(setting: Setting, one: Measured) -> None:
    """One call under the hooks."""
    models = (setting.model, setting.lowered, setting.unfrozen)
    with one.meter.watching(models, (setting.mlm.model, setting.unfrozen_bert)):
        one.runner(one.draws)


def run_attacks(
    setting: Setting,
    names: Sequence[str],
    *,
    short: bool,
    rows_file: Path,
    command: str,
    memory: Memory | None,
    peer: Peer | None,
    tell: Callable[[str], None],
) -> Iterator[QualityError]:
    """Measure, and append the rows of each attack and half when it is done; yields what the gate refused."""
    about = {
        "device": setting.device.type,
        "machine": machine_of(setting.device),
        "threads": torch.get_num_threads(),
        "versions": versions_of((*LIBRARIES, "transformers")),
        "commit": commit_of(HERE),
        "command": command,
    }
    for name in names:
        for job in jobs_of(name, setting):
            for half in job.halves[:1] if short else job.halves:
                tell(f"{job.name} ({half})")
                guest = peer if peer is not None and peer.attacks == job.name and half == "both" else None
                try:
                    measured, theirs, refused = measure(
                        setting,
                        job,
                        half,
                        seconds=0.0 if short else 10.0,
                        min_rounds=1 if short else 3,
                        memory=memory,
                        peer=guest,
                    )
                except QualityError as error:
                    yield error
                    continue
                common = about | {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "attack": job.name}
                common |= {"half": half, "setting": dict(setting.names), "pairs": len(job.batch.texts)}
                rows = [row_of(one, common) for one in measured]
                if guest is not None:
                    rows.append(row_of_peer(guest, theirs, common))
                append_rows(rows_file, rows)
                yield from refused


def row_of(one: Measured, common: Mapping[str, Any]) -> AttackRow:
    return AttackRow(
        **common,
        **quantiles(one.times),
        dtype=one.dtype,
        implementation="fastmat, cold" if one.who == "cold" else one.who,
        kind=one.who,
        counts=dict(one.meter.counts),
        syncs=one.syncs,
        shares=one.meter.shares(),
        peak=one.peak,
        quality=one.quality,
    )


def row_of_peer(peer: Peer, times: Sequence[float], common: Mapping[str, Any]) -> AttackRow:
    versions = {"the peer's " + name: version for name, version in peer.versions.items()}
    return AttackRow(
        **(dict(common) | {"versions": {**common["versions"], **versions}}),
        **quantiles(times),
        dtype="float32",
        implementation=peer.name,
        kind="original",
        counts={},
        syncs=None,
        shares={},
        peak=None,
        quality={},
    )


def quantiles(times: Sequence[float]) -> dict[str, Any]:
    p20, p50, p80 = (float(value) for value in np.quantile(times, (0.2, 0.5, 0.8)))
    return {"rounds": len(times), "p20": p20, "p50": p50, "p80": p80}
