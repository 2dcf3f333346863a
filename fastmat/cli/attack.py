"""Attack a model and write the adversarial set: images, captions and a manifest. Resumable.

    fastmat attack --config clip-vit-b16-flickr30k-attack --out runs/sga
    fastmat attack --config clip-vit-b16-flickr30k-attack --out runs/sga4 threat.eps=4/255
    fastmat attack --config clip-vit-b16-flickr30k-attack --out runs/universal attack=universal \\
      'fit_data={name: json, title: f30k, split: train, annotations: train.json, images: images}'

Several processes (accelerate launch, torchrun) attack together. An attack that is fitted before it
attacks (universal) learns from fit_data and keeps what it learnt as DIR/fitted.safetensors, which
`attack={name: universal, perturbation: FILE}` takes.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from fastmat.build import build_data, build_model, build_threat, resolve_device
from fastmat.cli.common import (
    Interrupted,
    MlmLoader,
    add_config_arguments,
    build_engine,
    check_out,
    fingerprint,
    label_of,
    open_candidates,
    tell_candidates,
)
from fastmat.cli.config import AttackConfig
from fastmat.cli.fitting import fit_set
from fastmat.cli.keys import describe
from fastmat.cli.load import load_config, plain
from fastmat.cli.making import attack_with_hash, files_of, make_set, plan_set
from fastmat.cli.parser import Parser
from fastmat.cli.together import stoppable, together
from fastmat.data.loader import evaluation_batches
from fastmat.evaluation.adversarial_set import MANIFEST
from fastmat.evaluation.evaluate import encode_gallery, gallery_context

# These decide how fast a set is made, not what is in it; an interrupted run may go on with others.
SPEED_KEYS = ("batch_size", "workers", "image_cache", "candidate_cache", "shard_size", "engine")
FIT_KEYS = ("fit_data", "fit_limit")  # a fingerprint of that data stands for them


def add_arguments(parser: Parser) -> None:
    add_config_arguments(parser, resume=True)
    parser.keys = partial(describe, AttackConfig)


def run(arguments: argparse.Namespace) -> None:
    config = load_config(AttackConfig, arguments.config, arguments.settings)
    write_attacked(config, arguments.out, resume=arguments.resume)


def write_attacked(config: AttackConfig, out: Path, *, resume: bool = False) -> None:
    """Write, or finish, the adversarial set at `out`; in several processes where a launcher started them."""
    threat = build_threat(config.threat)
    device = resolve_device(config.device)
    engine = build_engine(config.engine, device)
    check_out(out, resume=resume, sign=MANIFEST)
    cache = open_candidates(config.candidate_cache)
    with together() as processes, stoppable() as stop_asked:
        device = processes.device(device)
        attack, mlm_sha256 = attack_with_hash(
            config.attack,
            threat=threat,
            mlm=MlmLoader(config.mlm, device),
            seed=config.seed,
            candidate_cache=cache,
            where="attack",
        )
        dataset = build_data(config.data, limit=config.limit)
        fit_on = fit_set(config, dataset, needed_by="attack" if attack.needs_fit else None)
        model = build_model(config.model, device=device)
        batches = evaluation_batches(
            dataset,
            model.image_transform,
            batch_size=config.batch_size,
            workers=config.workers,
            image_cache=config.image_cache,
        )
        resolved = {key: value for key, value in plain(config).items() if key not in (*SPEED_KEYS, *FIT_KEYS)}
        resolved |= {"mlm_sha256": mlm_sha256, "precision": engine.precision, **(fit_on.inputs() if fit_on else {})}
        if files := files_of(config.attack):
            resolved["files"] = files
        if not attack.splits:
            resolved["batch_size"] = config.batch_size
        rows = range(dataset.n_images)
        plan = plan_set(
            weights=fingerprint(model),
            image_transform=model.image_transform,
            surrogate=label_of(config.model),
            label=config.attack.name,
            attack=attack,
            dataset=dataset,
            rows=rows,
            config=resolved,
            seed=config.seed,
            source={"data": plain(config.data), "limit": config.limit},
        )
        done = make_set(
            out,
            plan=plan,
            surrogate=model,
            attack=attack,
            engine=engine,
            batches=batches,
            rows=rows,
            context=lambda: gallery_context(encode_gallery(model, batches)),
            fit_on=fit_on,
            shard_images=config.shard_size,
            processes=processes,
            stop_asked=stop_asked,
        )
        counts = processes.all((cache.hits, cache.misses) if cache else (0, 0))
    if processes.first:
        tell_candidates(counts)
    if done < dataset.n_images:
        raise Interrupted(
            f"{done} of {dataset.n_images} images are saved in {out}; the same command with --resume goes on"
        )
    if processes.first:
        print(f"{done} images and {dataset.n_captions} captions, attacked by {config.attack.name}: {out}")
