"""The training loop, for every defence: perturb, one outer forward, loss, step."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from fastmat.attacks.draws import SeededDraws
from fastmat.defences.base import Defence
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.models.weights import save_weights
from fastmat.training.checkpoint import latest_checkpoint, load_checkpoint, read_run_state, save_checkpoint
from fastmat.training.forward import encode_views
from fastmat.training.interrupt import Interrupted, interruptible
from fastmat.training.log import StepLog
from fastmat.training.parameters import clamp_logit_scale, decay_groups, trained_parameters, training_mode
from fastmat.training.schedule import cosine_with_warmup
from fastmat.training.settings import TrainSettings
from fastmat.types import Batch

BAD_STEPS_IN_A_ROW = 3


class Batches(Protocol):
    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """The global batches of the steps `start:stop`; each a pure function of its step."""
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
) -> TrainReport:
    """Train `model` in place and write `out/model.safetensors`, `out/log.jsonl` and `out/checkpoints/`.

    batches: yields global batches; with several processes each takes its own slice, contrasts within that slice, and
        the gradients are averaged (DDP). The loss is therefore not the one of the whole batch in one process.
    config: everything else that decides the weights (model, data, defence); a resumed run must agree with it.
    resume: continue from the newest undamaged checkpoint in `out`; on the CPU the weights are those of a run never
        stopped, bit for bit, given the same number of processes.
    accelerator: default: one made here, without mixed precision of its own (`settings.precision` rules).

    Seeds the global generators before every outer forward (dropout). Raises UserError for an output folder in use, a
    checkpoint of another run or architecture, and after three steps in a row without a finite loss; Interrupted after
    Ctrl-C.
    """
    assert isinstance(model, nn.Module)
    accelerator = accelerator or Accelerator(mixed_precision="no")
    told = _told(defence, settings, config, accelerator.num_processes)
    found = _find_start(out, resume)
    accelerator.wait_for_everyone()

    model.to(accelerator.device)
    trained = trained_parameters(model, defence.trains)
    optimizer = torch.optim.AdamW(decay_groups(trained, settings.weight_decay), lr=settings.lr, betas=settings.betas)
    start = skipped = 0
    if found is not None:
        state = read_run_state(found, told)
        start, skipped = state["step"], state["skipped"]
        load_checkpoint(found, model=model, optimizer=optimizer)
    last_checkpoint = found
    log = StepLog(out / "log.jsonl", start=start, enabled=accelerator.is_main_process)
    bad_in_a_row = 0
    terms: dict[str, float] = {}
    silent = None if accelerator.is_main_process else True  # None: where no terminal shows it; log.jsonl has it all
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=settings.precision == "bf16")

    with (
        training_mode(model, trained, settings.norm_statistics),
        interruptible() as stop_asked,
        tqdm(total=settings.steps, initial=start, unit="step", disable=silent) as bar,
    ):
        wrapped, prepared = accelerator.prepare(model, optimizer)
        for step, whole in zip(range(start, settings.steps), batches.iterate(start, settings.steps), strict=True):
            batch = shard(whole, accelerator).to(accelerator.device)
            rate = settings.lr * cosine_with_warmup(step, steps=settings.steps, warmup_steps=settings.warmup_steps)
            for group in prepared.param_groups:
                group["lr"] = rate

            # Two regions: autocast keeps casts made without a graph until it is left.
            with autocast:
                views = defence.perturb(model, batch, SeededDraws(keyed(settings.seed, step)))
            set_seed(keyed(settings.seed, step, accelerator.process_index))  # dropout
            with autocast:
                features = encode_views(wrapped, model, views, batch)
            losses = defence.loss(features)
            accelerator.backward(sum(losses.values()))
            norm = accelerator.clip_grad_norm_(trained, settings.clip_norm or math.inf)
            # The only wait for the device: one small vector, averaged over the processes so that all decide alike.
            stop, norm, *values = _on_host(accelerator, [stop_asked(), norm, *losses.values()])

            terms = dict(zip(losses, values, strict=True))
            finite = math.isfinite(norm) and all(map(math.isfinite, values))
            if finite:
                prepared.step()
                clamp_logit_scale(model)
            prepared.zero_grad()
            skipped += not finite
            bad_in_a_row = 0 if finite else bad_in_a_row + 1
            if bad_in_a_row == BAD_STEPS_IN_A_ROW:
                raise UserError(_diverged(step, last_checkpoint, out))

            log.count(len(whole.texts))
            bar.update()
            done = step + 1
            if done % settings.log_every == 0 or done == settings.steps or not finite:
                line = log.write(done, terms, grad_norm=norm, lr=rate, skipped=skipped)
                bar.set_postfix_str(f"loss {sum(values):.4f}, {line['pairs_per_s']:.0f} pairs/s")
            if finite and (done % settings.save_every == 0 or done == settings.steps or stop):
                last_checkpoint = save_checkpoint(
                    out / "checkpoints",
                    accelerator=accelerator,
                    model=model,
                    optimizer=optimizer,
                    state={"step": done, "skipped": skipped, "told": told},
                    keep_last=settings.keep_last,
                )
                if stop and done < settings.steps:
                    raise Interrupted(last_checkpoint)
        weights = out / "model.safetensors"
        if accelerator.is_main_process:
            save_weights(model, weights, metadata=told)
        accelerator.wait_for_everyone()
        return TrainReport(
            weights=weights,
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


def shard(batch: Batch, accelerator: Accelerator) -> Batch:
    """This process's slice of a global batch."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    if len(batch) % processes:
        raise UserError(
            f"the batch of {len(batch)} images cannot be divided among {processes} processes; "
            f"set batch_size to a multiple of {processes}"
        )
    size = len(batch) // processes
    return batch.rows(rank * size, (rank + 1) * size) if processes > 1 else batch


def _find_start(out: Path, resume: bool) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start; raises UserError where `out` does not fit."""
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"output folder {out} exists and is not empty; choose another one or resume it")
        return None
    found = latest_checkpoint(out / "checkpoints")
    if found is None:
        raise UserError(f"there is no undamaged checkpoint to resume in {out}; start without resume in a new folder")
    return found


def _told(defence: Defence, settings: TrainSettings, config: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """What a resumed run must share, as JSON keeps it: all that decides the weights."""
    told = {
        "defence": type(defence).__name__,
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("save_every", "keep_last", "log_every")},
        "config": config,
        "processes": processes,
    }
    plain: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return plain


def _on_host(accelerator: Accelerator, values: list[Any]) -> list[float]:
    device = accelerator.device
    row = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device).detach() for v in values])
    reduced: Tensor = accelerator.reduce(row, reduction="mean")
    return reduced.tolist()


def _diverged(step: int, checkpoint: Path | None, out: Path) -> str:
    saved = f"the last good checkpoint is {checkpoint}" if checkpoint else f"no checkpoint was saved yet in {out}"
    return (
        f"the loss or its gradient was not finite {BAD_STEPS_IN_A_ROW} steps in a row (up to step {step + 1}); "
        f"{saved}; lower lr, raise warmup_steps or use precision: no"
    )
