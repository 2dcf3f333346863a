"""Harden a model by a defence, or fine-tune it without one. Resumable, bit for bit on a CPU.

fastmat train --config clip-vit-b16-flickr30k-train --out runs/mat
accelerate launch $(which fastmat) train --config clip-vit-b16-flickr30k-train --out runs/mat
"""

from __future__ import annotations

import argparse
import signal
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from fastmat.build import (
    build_augmentation,
    build_batches,
    build_defence,
    build_matching,
    build_model,
    build_threat,
    build_training_data,
    construct,
)
from fastmat.cli.common import Interrupted, MlmLoader, add_config_arguments, check_out, open_candidates, tell_candidates
from fastmat.cli.config import TrainConfig
from fastmat.cli.keys import describe
from fastmat.cli.load import load_config, plain
from fastmat.cli.parser import Parser
from fastmat.cli.processes import is_first_process
from fastmat.cli.watching import watching
from fastmat.data.labelled import class_prompts
from fastmat.data.retrieval import RetrievalSet
from fastmat.data.shards import ShardSet
from fastmat.defences.teacher_cache import TeacherCache
from fastmat.errors import UserError
from fastmat.models.adapters import AdapterSettings, add_adapters, merge_file
from fastmat.training import interrupt
from fastmat.training.engine import make_accelerator
from fastmat.training.loop import TrainReport, never_saved, train
from fastmat.training.peers import PeerLost, Peers, noticing_loss
from fastmat.training.settings import TrainSettings
from fastmat.types import ImageTransform

# Keys that decide nothing about the weights.
OUTSIDE = ("workers", "candidate_cache", "validation", "tracker")


def add_arguments(parser: Parser) -> None:
    add_config_arguments(parser, resume=True)
    parser.keys = partial(describe, TrainConfig)


def run(arguments: argparse.Namespace) -> None:
    config = load_config(TrainConfig, arguments.config, arguments.settings)
    try:
        report = train_model(config, arguments.out, resume=arguments.resume)
    except interrupt.Interrupted as stopped:  # SIGTERM: what a scheduler asks for is done, and is no error
        if is_first_process():
            print(f"stopped; saved in {stopped.checkpoint}; the same command with --resume goes on")
        return
    if is_first_process():
        print(f"{report.steps} steps of {config.defence.name}, {report.pairs_per_s:.1f} pairs/s: {report.weights}")


def train_model(config: TrainConfig, out: Path, *, resume: bool = False) -> TrainReport:
    """Train as `config` says; `out/model.safetensors` are the weights.

    Raises `fastmat.cli.common.Interrupted` after Ctrl-C and where another process ended, `interrupt.Interrupted` after
    SIGTERM.
    """
    threat = build_threat(config.threat)
    settings = construct(TrainSettings, config.train, where="train", given={"seed": lambda: config.seed})
    if not never_saved(out):
        check_out(out, resume=resume, sign="checkpoints")
    joined = torch.distributed.is_initialized()
    accelerator = make_accelerator()
    dataset = build_training_data(config.data, limit=config.limit)
    model = build_model(config.model)
    mlm = MlmLoader(config.mlm, accelerator.device)
    cache = open_candidates(config.candidate_cache)
    teacher = model if config.teacher is None else build_model(config.teacher, where="teacher")
    defence = build_defence(
        config.defence,
        teacher=teacher,
        threat=threat,
        mlm=mlm,
        seed=config.seed,
        candidate_cache=cache,
        prompts=lambda: class_prompts(dataset) if isinstance(dataset, RetrievalSet) else None,
        teacher_cache=open_teacher_cache(config, dataset, model.image_transform, accelerator),
    )
    adapters = None if config.adapters is None else construct(AdapterSettings, config.adapters, where="adapters")
    if adapters is not None:
        add_adapters(model, adapters, seed=config.seed)
    if config.matching is not None:
        defence = build_matching(config.matching, defence, model, seed=config.seed)
    batches = build_batches(
        dataset,
        model.image_transform,
        batch_size=config.batch_size,
        captions_per_image=config.captions_per_image,
        seed=config.seed,
        workers=config.workers,
    )
    augment = build_augmentation(config.augment, dataset)
    told = {key: value for key, value in plain(config).items() if key not in ("train", *OUTSIDE)}
    told["teacher_cache"] = config.teacher_cache is not None  # wherever it lies, it decides the last bits
    told |= {"data_fingerprint": dataset.fingerprint(), "mlm_sha256": mlm.sha256}
    look_on = watching(
        config,
        settings,
        out=out,
        told=told,
        transform=model.image_transform,
        mlm=mlm,
        accelerator=accelerator,
        candidate_cache=cache,
    )
    try:
        with noticing_loss(), look_on as watchers:
            report = train(
                model,
                defence,
                batches,
                settings=settings,
                out=out,
                resume=resume,
                config=told,
                augment=augment,
                accelerator=accelerator,
                watchers=watchers,
            )
    except interrupt.Interrupted as stopped:
        leave(joined)
        if stopped.asked_by == signal.SIGTERM:
            raise
        raise Interrupted(f"saved in {stopped.checkpoint}; the same command with --resume goes on") from stopped
    except PeerLost as lost:
        raise Interrupted(f"{lost}; the same command with --resume goes on from the last checkpoint") from lost
    if adapters is not None and is_first_process():
        plain_model = build_model(config.model)
        add_adapters(plain_model, adapters)
        merge_file(plain_model, report.weights)
    leave(joined)
    if cache and is_first_process():
        tell_candidates([(cache.hits, cache.misses)])
    return report


def open_teacher_cache(
    config: TrainConfig, dataset: RetrievalSet | ShardSet, transform: ImageTransform, accelerator: Accelerator
) -> TeacherCache | None:
    """What the teacher makes of the clean images, where a folder is given. Raises UserError where those change."""
    if config.teacher_cache is None:
        return None
    if not isinstance(dataset, RetrievalSet):
        raise UserError("teacher_cache is for a whole set, not for shards: leave it out")
    if config.augment.get("views"):
        raise UserError("teacher_cache needs the same images at every epoch: leave it out, or set augment.views to 0")
    peers = Peers(rank=accelerator.process_index, world=accelerator.num_processes, device=accelerator.device)
    return TeacherCache(config.teacher_cache, dataset, transform, agreed=peers.agreed, workers=config.workers)


def leave(joined: bool) -> None:
    """End the process group unless it was there before; never on an error, which the others may not have met."""
    if torch.distributed.is_initialized() and not joined:
        torch.distributed.barrier()  # gloo may abort where one process leaves while another still talks
        torch.distributed.destroy_process_group()
