"""All chosen steps: gate, counts and split, memory, then rounds with a step of every contestant, in rotating order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, cast

import torch

from fastmat.attacks.draws import Draws, SeededDraws
from fastmat.benchmarks.attacks.draws import DeviceDraws
from fastmat.benchmarks.attacks.meter import with_host_syncs
from fastmat.benchmarks.attacks.setting import Setting
from fastmat.benchmarks.attacks.suite import quantiles
from fastmat.benchmarks.harness import QualityError, Timer
from fastmat.benchmarks.scaling.work import Texts
from fastmat.benchmarks.train.floor import floor_flops, product_rate, shape_of
from fastmat.benchmarks.train.gate import Seen, compare, gradients_of, see
from fastmat.benchmarks.train.job import Contestant, Dtype, Job, Stepped
from fastmat.benchmarks.train.meter import Split, StepMeter
from fastmat.benchmarks.train.pairs import Pairs
from fastmat.benchmarks.train.rows import TrainRow

SEED = 0
Memory = Callable[[str, str, Dtype], int | None]


@dataclass(kw_only=True)
class Measured:
    """One contestant, while it is measured."""

    who: Contestant
    draws: Draws
    syncs: int
    quality: dict[str, float]
    meter: StepMeter = field(default_factory=StepMeter)
    shares: dict[str, float] = field(default_factory=dict)
    peak: int | None = None
    times: list[float] = field(default_factory=list)


def job_of(name: str, setting: Setting, split: Split, pairs: Pairs) -> Job:
    return cast("Job", import_module(f"fastmat.benchmarks.train.{name}").job(setting, split, pairs))


def admitted(job: Job, setting: Setting) -> tuple[list[Measured], list[QualityError]]:
    """The contestants that passed the gate, and what was refused in 16 bits. Raises QualityError for one in fp32."""
    batch = job.batch(0)
    clean = job.values(Stepped(batch.images, batch.texts, batch.images.new_zeros(())))
    plain: dict[str, Seen] = {}
    measured, refused = [], []
    for who in job.contestants:
        step = who.gated or who.step
        with gradients_of(who.model, who.optimizer) as gradients:
            stepped, syncs = with_host_syncs(lambda step=step: step(batch, SeededDraws(SEED)), setting.device)
        who.model.zero_grad()
        seen = see(job, stepped, gradients)
        try:
            quality = compare(who, seen, plain.setdefault(who.like, seen), clean=clean, title=job.name)
        except QualityError as error:
            if who.dtype == "float32":
                raise
            refused.append(error)
            continue
        ours = who.kind in ("fastmat", "finetune")
        draws = SeededDraws(SEED) if ours else DeviceDraws(setting.device, SEED)
        measured.append(Measured(who=who, draws=draws, syncs=syncs, quality=quality))
    return measured, refused


def observe(job: Job, one: Measured, setting: Setting, split: Split) -> None:
    """One step under the hooks."""
    who = one.who
    berts = (setting.mlm.model, setting.unfrozen_bert)
    with one.meter.watching((who.model, *who.watched), berts), split.watching() as seconds:
        with split("loading"):
            batch = job.batch(0)
        who.step(batch, one.draws)
        who.model.zero_grad()
    total = sum(seconds.values())
    one.shares = {part: spent / total for part, spent in seconds.items()}


def measure(
    job: Job, setting: Setting, split: Split, *, seconds: float, min_rounds: int, memory: Memory | None
) -> tuple[list[Measured], list[QualityError]]:
    """Gate, counts, peaks, then at least `min_rounds` rounds for about `seconds`; and what was refused.

    Raises QualityError when a step in fp32 is another one; nothing is timed then.
    """
    measured, refused = admitted(job, setting)
    for one in measured:
        observe(job, one, setting, split)
        if memory is not None:
            one.peak = memory(job.name, one.who.kind, one.who.dtype)
    timer = Timer(setting.device)
    begun, rounds = time.perf_counter(), 0
    while rounds < min_rounds or (time.perf_counter() - begun < seconds and rounds < 1000):
        for number in range(len(measured)):
            one = measured[(rounds + number) % len(measured)]
            one.times.append(timer(lambda one=one, at=rounds: one.who.step(job.batch(at), one.draws)))
            one.who.model.zero_grad()  # a gradient that stays, as TeCoA's of texts does, is nobody else's
        rounds += 1
    return measured, refused


def rows_of(job: Job, setting: Setting, measured: list[Measured], common: Mapping[str, Any]) -> Iterator[TrainRow]:
    pairs = len(job.batch(0))
    floors = Floors(job, setting, measured)
    for one in measured:
        yield TrainRow(
            **common,
            **quantiles(one.times),
            attack=job.name,
            half="both",
            pairs=pairs,
            dtype=one.who.dtype,
            implementation=one.who.kind,
            kind=one.who.kind,
            counts=dict(one.meter.counts),
            syncs=one.syncs,
            shares=one.shares,
            peak=one.peak,
            quality=one.quality,
            floor=floors(one),
        )


class Floors:
    """The floor of each contestant's step, in milliseconds; as many texts as ours encodes, of the batch's lengths."""

    def __init__(self, job: Job, setting: Setting, measured: list[Measured]) -> None:
        batch = job.batch(0)
        self.batch = len(batch)
        self.job = job
        self.device = setting.device
        self.shape = shape_of(setting.model_folder)
        self.rates: dict[str, float] = {}
        lengths = setting.model.tokenize(batch.texts).mask.sum(1).tolist()
        encoded = next((m.meter.counts["text_encodings"] for m in measured if m.who.kind == "fastmat"), 0)
        self.texts = Texts(
            words=max(0.0, encoded / self.batch - 3),  # beside the caption, the chosen text, and the outer forward's
            candidates=0.0,
            tokens=round(sum(lengths) / len(lengths)),
            longest=max(lengths),
        )

    def __call__(self, one: Measured) -> float | None:
        if self.shape is None:
            return None
        dtype = one.who.dtype
        if dtype not in self.rates:
            self.rates[dtype] = product_rate(self.device, getattr(torch, dtype))
        step = "finetune" if one.who.kind.endswith("finetune") else self.job.name
        return 1e3 * floor_flops(self.shape, step, self.texts, batch=self.batch) / self.rates[dtype]
