"""Attack a model and write the adversarial set: images, captions and a manifest. Resumable.

fastmat attack --config clip-vit-b16-flickr30k-attack --out runs/sga
fastmat attack --config configs/clip-vit-b16-flickr30k-attack.yaml --out runs/sga4 threat.eps=4/255
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from fastmat.build import build_attack, build_data, build_model, build_threat, resolve_device
from fastmat.cli.common import (
    Interrupted,
    MlmLoader,
    add_config_arguments,
    check_out,
    counted,
    fingerprint,
    label_of,
    progress,
)
from fastmat.cli.config import AttackConfig
from fastmat.cli.keys import describe
from fastmat.cli.load import load_config, plain
from fastmat.cli.parser import Parser
from fastmat.data.loader import evaluation_batches
from fastmat.evaluation.adversarial_set import MANIFEST, AdversarialSetWriter
from fastmat.evaluation.evaluate import encode_gallery, gallery_context, run_attack
from fastmat.evaluation.manifest import Manifest, config_fingerprint
from fastmat.evaluation.results import Threat
from fastmat.training.interrupt import interruptible

# These decide how fast a set is made, not what is in it; an interrupted run may go on with others.
SPEED_KEYS = ("batch_size", "workers", "shard_size")


def add_arguments(parser: Parser) -> None:
    add_config_arguments(parser, resume=True)
    parser.keys = partial(describe, AttackConfig)


def run(arguments: argparse.Namespace) -> None:
    config = load_config(AttackConfig, arguments.config, arguments.settings)
    write_attacked(config, arguments.out, resume=arguments.resume)


def write_attacked(config: AttackConfig, out: Path, *, resume: bool = False) -> None:
    """Write, or finish, the adversarial set at `out`."""
    threat = build_threat(config.threat)
    device = resolve_device(config.device)
    check_out(out, resume=resume, sign=MANIFEST)
    mlm = MlmLoader(config.mlm, device)
    attack = build_attack(config.attack, threat=threat, mlm=mlm, seed=config.seed)
    dataset = build_data(config.data, limit=config.limit)
    model = build_model(config.model, device=device)
    batches = evaluation_batches(dataset, model.image_transform, batch_size=config.batch_size, workers=config.workers)
    resolved = {key: value for key, value in plain(config).items() if key not in SPEED_KEYS}
    resolved["mlm_sha256"] = mlm.sha256
    plan = Manifest(
        model=fingerprint(model),
        data=dataset.fingerprint(),
        config_sha256=config_fingerprint(resolved),
        config=resolved,
        surrogate=label_of(config.model),
        image_transform=model.image_transform,
        attack=config.attack.name,
        threat=Threat(eps=threat.eps, norm=threat.norm, max_words=threat.max_words),
        dataset=dataset.name,
        split=dataset.split,
        seed=config.seed,
        n_images=dataset.n_images,
    )
    context = gallery_context(encode_gallery(model, batches))
    with (
        interruptible() as stop_asked,
        AdversarialSetWriter(out, plan=plan, ids=dataset.ids, shard_images=config.shard_size) as writer,
        progress(dataset.n_captions, f"{config.attack.name} on {dataset.name}") as bar,
    ):
        bar.update(sum(map(len, dataset.captions[: writer.n_done])))
        for attacked in counted(run_attack(model, attack, writer.missing(batches), context), bar):
            writer.add(attacked)
            if stop_asked():
                break
    if writer.n_done < dataset.n_images:
        raise Interrupted(
            f"{writer.n_done} of {dataset.n_images} images are saved in {out}; the same command with --resume goes on"
        )
    print(f"{writer.n_done} images and {dataset.n_captions} captions, attacked by {config.attack.name}: {out}")
