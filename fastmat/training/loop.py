"""The training loop, for every defence and every engine: perturb, one outer forward, loss, step."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from fastmat.attacks.draws import Draws, SeededDraws
from fastmat.defences.base import Defence, remembers
from fastmat.defences.phases import heard_by
from fastmat.defences.terms import gathering
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.models.weights import load_weights, save_state
from fastmat.training.checkpoint import (
    checkpoints,
    latest_checkpoint,
    mark_best,
    read_memory,
    read_moments,
    read_run_state,
    save_checkpoint,
)
from fastmat.training.clock import StepClock, split_text
from fastmat.training.engine import check_moments, make_accelerator, make_engine
from fastmat.training.forward import encode_views
from fastmat.training.interrupt import Interrupted, interruptible
from fastmat.training.log import StepLog
from fastmat.training.outer import Outer, checkpointed_blocks
from fastmat.training.parameters import NormStatistics, trained_parameters, training_mode
from fastmat.training.peers import Peers
from fastmat.training.schedule import cosine_with_warmup
from fastmat.training.settings import TrainSettings
from fastmat.training.watch import Watcher
from fastmat.types import Batch

BAD_STEPS_IN_A_ROW = 3
# Settings that change how a step is computed and what is written, not what is computed.
OUTSIDE = ("save_every", "keep_last", "log_every", "micro_batch", "activation_checkpointing", "compile")


class Batches(Protocol):
    def iterate(self, start: int, stop: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The share of process `rank` out of `world` in the global batches of the steps `start:stop`.

        A pure function of the step: the shares of all processes are the batch of one process, in order. All have
        equally many images; the call raises UserError where that cannot be.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """weights: the final file. steps: outer steps of the whole run; skipped: those without an update because the loss
    or its gradient was not finite. terms: the last step's loss terms. seconds, pairs_per_s: of this call alone."""

    weights: Path
    steps: int
    skipped: int
    resumed_from: int
    terms: dict[str, float]
    seconds: float
    pairs_per_s: float


def train(
    model: VisionLanguageModel,
    defence: Defence,
    batches: Batches,
    *,
    settings: TrainSettings,
    out: Path,
    resume: bool = False,
    config: Mapping[str, Any],
    accelerator: Accelerator | None = None,
    augment: Callable[[Batch, Draws], Batch] | None = None,
    watchers: Sequence[Watcher] = (),
) -> TrainReport:
    """Train `model` and write `out/model.safetensors`, `out/log.jsonl` and `out/checkpoints/`.

    model: trained in place; where weights are sharded (ZeRO stage 3, FSDP2) it stays so, and the file has them whole.
    batches: each process reads its share. Contrastive terms run over the batch of all processes, and the update is
        that of one process with the whole batch, to rounding.
    config: everything else that decides the weights (model, data, defence); a resumed run must agree with it.
    resume: continue from the newest undamaged checkpoint in `out`; on the CPU the weights are those of a run never
        stopped, bit for bit, given the same number of processes and engine. Others continue from the same step, and a
        warning says so. A run that ended before its first checkpoint starts again.
    accelerator: default: one made here, without mixed precision of its own (`settings.precision` rules).
    augment: adds images and texts to a process's share, on the device, before the attack.
    watchers: told of log lines and checkpoints.

    Seeds the global generators before every outer forward (dropout). Raises UserError for an output folder in use, a
    checkpoint of another run or architecture, a checkpoint that cannot be written, what the engine cannot do, and
    after three steps in a row without a finite loss; Interrupted after Ctrl-C or SIGTERM, when the state is saved.
    """
    assert isinstance(model, nn.Module)
    accelerator = accelerator or make_accelerator()
    peers = Peers(rank=accelerator.process_index, world=accelerator.num_processes, device=accelerator.device)
    told = _told(defence, settings, config)
    found = peers.agreed(lambda: _find_start(out, resume))

    model.to(accelerator.device)
    memory = defence.memory if remembers(defence) else None
    if memory is not None:
        memory.to(accelerator.device)
    chosen = {id(parameter) for parameter in trained_parameters(model, defence.trains)}
    trained = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}
    start = skipped = 0
    written_by: dict[str, Any] = {}
    moments: dict[str, Tensor] = {}
    if found is not None:
        state = read_run_state(found, told)
        start, skipped, written_by = state["step"], state["skipped"], state["written_by"]
        load_weights(model, found / "weights.safetensors")
        moments = read_moments(found)
        check_moments(moments, trained)
        if memory is not None:
            read_memory(found, memory)
    shares = batches.iterate(start, settings.steps, rank=peers.rank, world=peers.world)
    outer = Outer(model, settings, device=accelerator.device)

    with (
        training_mode(model, list(trained.values()), settings.norm_statistics),
        checkpointed_blocks(model, settings.activation_checkpointing),
        interruptible(signal.SIGINT) as interrupted,
        interruptible(signal.SIGTERM) as terminated,
    ):
        engine = make_engine(accelerator, outer, model, trained, settings)
        runs = {"processes": peers.world, "engine": engine.name}
        if found is not None:
            engine.load_moments(moments, updates=start - skipped)
            _tell_of_change(found, written_by, runs, first=peers.rank == 0)
        statistics = NormStatistics(model)
        last_checkpoint = found
        log = StepLog(out / "log.jsonl", start=start, enabled=peers.rank == 0)
        clock = StepClock(accelerator.device)
        bad_in_a_row = 0
        terms: dict[str, float] = {}
        silent = None if peers.rank == 0 else True  # None: where no terminal shows it; log.jsonl has it all
        bar = tqdm(total=settings.steps, initial=start, unit="step", disable=silent)
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=settings.precision == "bf16")

        def watched(done: int, checkpoint: Path) -> None:
            for watcher in watchers:
                seen = watcher.saved(done, checkpoint, engine.attacked())
                if seen is None:
                    continue
                if seen.get("best") and peers.rank == 0:
                    mark_best(checkpoint)
                line = log.note(done, seen)
                for other in watchers:
                    other.logged(line)

        if found is not None:
            watched(start, found)  # it may have been saved and no more
        for step in range(start, settings.steps):
            clock.enter("loading")
            draws = SeededDraws(keyed(settings.seed, step))

            def fetch(draws: Draws = draws) -> Batch:
                share = next(shares).to(accelerator.device)
                return share if augment is None else augment(share, draws)

            batch, texts = peers.shared(fetch)
            clock.enter("image_attack")
            of_all = partial(peers.context, texts=texts) if peers.world > 1 else None
            with engine.attacked() as attacked, gathering(of_all), autocast, heard_by(clock.enter):
                views = defence.perturb(attacked, batch, draws)
            clock.enter("outer")
            set_seed(keyed(settings.seed, step, peers.rank))  # dropout
            statistics.keep()
            features = encode_views(engine.forward, model, views, batch, peers=peers, texts=texts)
            with autocast:
                losses = defence.loss(features)
            total = torch.stack(list(losses.values())).sum()
            # A loss that is not finite makes the gradients of all processes so, and all skip the step.
            poisoned = total * torch.where(total.isfinite(), 1.0, math.nan)
            rate = settings.lr * cosine_with_warmup(step, steps=settings.steps, warmup_steps=settings.warmup_steps)
            norm = engine.backward(poisoned, rate=rate)
            clock.enter("outer")  # a border that the device will have passed in a moment
            # The only wait for the device: one small vector, averaged over the processes so that all decide alike.
            ctrl_c, sigterm, gradient, *values = peers.mean([interrupted(), terminated(), norm, *losses.values()])

            clock.read()

            terms = dict(zip(losses, values, strict=True))
            finite = math.isfinite(gradient) and all(map(math.isfinite, values))
            engine.step(update=finite)
            if not finite:
                statistics.restore()
            elif remembers(defence):
                defence.remember()
            skipped += not finite
            bad_in_a_row = 0 if finite else bad_in_a_row + 1
            if bad_in_a_row == BAD_STEPS_IN_A_ROW:
                raise UserError(_diverged(step, last_checkpoint, out))

            log.count(sum(texts))
            bar.update()
            done = step + 1
            if done % settings.log_every == 0 or done == settings.steps or not finite:
                taken = clock.taken()
                line = log.write(done, terms, grad_norm=gradient, lr=rate, skipped=skipped, taken=taken)
                bar.set_postfix_str(f"loss {sum(values):.4f}, {line['pairs_per_s']:.0f} pairs/s, {split_text(taken)}")
                for watcher in watchers:
                    watcher.logged(line)
            if finite and (done % settings.save_every == 0 or done == settings.steps or ctrl_c or sigterm):
                clock.enter("saving")
                save = partial(
                    save_checkpoint,
                    out / "checkpoints",
                    weights=engine.weights(),
                    moments=engine.moments(),
                    state={"step": done, "skipped": skipped, "told": told, "written_by": runs},
                    keep_last=settings.keep_last,
                    memory=None if memory is None else memory.state_dict(),
                )
                last_checkpoint = peers.agreed(save)
                if (ctrl_c or sigterm) and done < settings.steps:
                    raise Interrupted(last_checkpoint, signal.SIGINT if ctrl_c else signal.SIGTERM)
                watched(done, last_checkpoint)
        weights = engine.weights()
        bar.close()
    final = out / "model.safetensors"
    peers.agreed(partial(save_state, weights, final, metadata=told | runs))
    return TrainReport(
        weights=final,
        steps=settings.steps,
        skipped=skipped,
        resumed_from=start,
        terms=terms,
        seconds=log.seconds,
        pairs_per_s=log.pairs_per_s,
    )


def keyed(*parts: int) -> int:
    """A 32-bit seed that is a function of `parts` alone, so that no random stream has a state to save."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest(), "big")


def never_saved(out: Path) -> bool:
    """Whether a run in `out` ended before its first checkpoint: there is nothing to lose or to go on with."""
    left = {path.name for path in out.iterdir()} if out.is_dir() else set()
    begun = "log.jsonl" in left and left <= {"log.jsonl", "checkpoints", "trackers"}
    return begun and not checkpoints(out / "checkpoints")


def _find_start(out: Path, resume: bool) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start; raises UserError where `out` does not fit."""
    if never_saved(out):
        warnings.warn(f"the run in {out} ended before its first checkpoint; starting from the beginning")
        return None
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"output folder {out} exists and is not empty; choose another one or resume it")
        return None
    found = latest_checkpoint(out / "checkpoints")
    if found is None:
        raise UserError(f"there is no undamaged checkpoint to resume in {out}; start without resume in a new folder")
    return found


def _told(defence: Defence, settings: TrainSettings, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must share, as JSON keeps it: all that decides the weights."""
    told = {
        "defence": type(defence).__name__,
        "settings": {k: v for k, v in asdict(settings).items() if k not in OUTSIDE},
        "config": config,
    }
    plain: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return plain


def _tell_of_change(found: Path, then: Mapping[str, Any], now: Mapping[str, Any], *, first: bool) -> None:
    """A warning where a run goes on in another way than it was saved."""
    if first and then != now:
        was, is_now = (f"{runs['processes']} process(es), engine {runs['engine']}" for runs in (then, now))
        warnings.warn(
            f"{found} was written by {was}; going on from the same sample with {is_now}: "
            "the weights will agree to rounding, not bit for bit"
        )


def _diverged(step: int, checkpoint: Path | None, out: Path) -> str:
    saved = (
        f"the last good checkpoint is {checkpoint}"
        if checkpoint
        else f"no checkpoint was saved yet, so {out} may be used again as it is"
    )
    return (
        f"the loss or its gradient was not finite {BAD_STEPS_IN_A_ROW} steps in a row (up to step {step + 1}); "
        f"{saved}; lower lr, raise warmup_steps or use precision: no"
    )
