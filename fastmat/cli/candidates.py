"""Compute what a masked language model proposes for captions, once: later runs read it.

    fastmat candidates --out cache/words mlm=google-bert/bert-base-uncased \\
      'data={name: json, title: flickr30k, split: test, annotations: test.json, images: images}'
    fastmat attack --config clip-vit-b16-flickr30k-attack --out runs/sga candidate_cache=cache/words

One folder serves any number of data sets, language models and settings. What it holds is not
computed again, so that the same command goes on after a kill. What a CPU and what a GPU proposes
are kept apart: fill the folder on the kind of device that attacks.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from fastmat.build import CANDIDATES, build, build_data, given_of, resolve_device, split_quirks
from fastmat.cli.common import Interrupted, MlmLoader, open_candidates, progress, tell_candidates
from fastmat.cli.config import CandidatesConfig
from fastmat.cli.keys import describe
from fastmat.cli.load import load_config
from fastmat.cli.parser import Parser
from fastmat.errors import UserError
from fastmat.text.candidate_cache import CAPTIONS_PER_WRITE
from fastmat.text.masked import MaskedCandidates
from fastmat.types import ThreatModel


def add_arguments(parser: Parser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="overrides, such as limit=100")
    parser.add_argument("--config", metavar="NAME_OR_PATH", help="a YAML file")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder to fill, new or not; or candidate_cache=DIR")
    parser.keys = partial(describe, CandidatesConfig)


def run(arguments: argparse.Namespace) -> None:
    config = load_config(CandidatesConfig, arguments.config, arguments.settings)
    folder = arguments.out or config.candidate_cache
    if folder is None:
        raise UserError("no folder is named to keep candidates in: add --out DIR")
    fill(config, folder)
    print(folder)


def fill(config: CandidatesConfig, folder: Path) -> None:
    """Compute what `folder` lacks, a chunk at a time; a finished chunk stays, whatever happens."""
    _, quirks = split_quirks({"parity": config.parity, "quirks": config.quirks}, where="")
    cache = open_candidates(folder)
    mlm = MlmLoader(config.mlm, resolve_device(config.device))
    given = given_of(threat=ThreatModel(), mlm=mlm, quirks=quirks, seed=0, candidate_cache=cache)
    dataset = build_data(config.data, limit=config.limit)
    source = build(CANDIDATES, config.candidates, where="candidates", given=given)
    if cache is None or not isinstance(source, MaskedCandidates):
        raise UserError(f"candidates: '{config.candidates.name}' keeps nothing on disk, only 'masked' does")
    captions = list(dict.fromkeys(caption for own in dataset.captions for caption in own))
    done = 0
    with progress(len(captions), f"candidates of {dataset.name}/{dataset.split}", unit="caption") as bar:
        try:
            for done in range(0, len(captions), CAPTIONS_PER_WRITE):
                chunk = captions[done : done + CAPTIONS_PER_WRITE]
                source.fill(chunk, quirks=quirks)
                bar.update(len(chunk))
        except KeyboardInterrupt as error:
            raise Interrupted(f"{done:,} of {len(captions):,} captions are in {folder}; repeat to go on") from error
    tell_candidates([(cache.hits, cache.misses)])
