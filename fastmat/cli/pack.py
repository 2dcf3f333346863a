"""Pack a set into WebDataset shards, which training streams: sets that do not fit in memory.

    fastmat pack --out shards/f30k --images-per-shard 5000 --resize 256 \\
      'data={name: json, title: flickr30k, split: train, annotations: train.json, images: images}'
    fastmat train --config clip-vit-b16-flickr30k-train --out runs/mat \\
      'data={name: shards, index: shards/f30k/index.json}'

Shards that others wrote need an index, which --index makes; --check compares every shard with it:

    fastmat pack --index /data/cc12m
    fastmat pack --check /data/cc12m
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from fastmat.build import build_data
from fastmat.cli.common import Interrupted, check_out, progress
from fastmat.cli.config import PackConfig
from fastmat.cli.keys import describe
from fastmat.cli.load import load_config
from fastmat.cli.parser import Parser
from fastmat.data.pack import PACKING, Packing, index_folder, pack
from fastmat.data.shard_index import INDEX, ShardIndex, check_shards
from fastmat.errors import UserError


def add_arguments(parser: Parser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="overrides, such as limit=100")
    parser.add_argument("--config", metavar="NAME_OR_PATH", help="a YAML file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="DIR", type=Path, help="new folder for the shards")
    what.add_argument("--index", metavar="DIR", type=Path, help="make the index of the shards in DIR, and no shard")
    what.add_argument("--check", metavar="DIR", type=Path, help="compare the shards in DIR with their sha256")
    parser.add_argument("--images-per-shard", metavar="N", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--resize", metavar="PIXELS", type=int, help="shrink larger pictures to this shorter side")
    parser.add_argument("--quality", metavar="Q", type=int, default=95, help="of JPEG, with --resize; %(default)s")
    parser.add_argument("--workers", metavar="N", type=int, default=0, help="processes that write shards")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    parser.keys = partial(describe, PackConfig)


def run(arguments: argparse.Namespace) -> None:
    if arguments.out is not None:
        folder, index = arguments.out, pack_set(arguments)
    elif arguments.settings or arguments.config:
        raise UserError("--index and --check read shards that are there; leave --config and key=value out")
    elif arguments.index is not None:
        folder, index = arguments.index, index_folder(arguments.index)
    else:
        folder, index = arguments.check, check_shards(arguments.check)
    print(f"{index.samples:,} samples in {len(index.shards):,} shards: {folder / INDEX}")


def pack_set(arguments: argparse.Namespace) -> ShardIndex:
    if arguments.workers < 0:
        raise UserError(f"--workers must not be negative, got {arguments.workers}")
    config = load_config(PackConfig, arguments.config, arguments.settings)
    check_out(arguments.out, resume=arguments.resume, sign=PACKING)
    dataset = build_data(config.data, limit=config.limit)
    packing = Packing(
        dataset=dataset,
        folder=arguments.out,
        images_per_shard=arguments.images_per_shard,
        resize=arguments.resize,
        quality=arguments.quality,
    )
    with progress(dataset.n_images, f"{dataset.name}/{dataset.split}", unit="image") as bar:
        try:
            return pack(packing, workers=arguments.workers, done=bar.update)
        except KeyboardInterrupt as error:
            raise Interrupted(f"the same command with --resume goes on in {arguments.out}") from error
