"""Rank images and captions of a data set, clean and attacked: surrogates x attacks x victims.

Writes results.json, examples.json and report.html. Every attack is run once on each surrogate and
judged on all victims; without surrogates, each victim is attacked through its own gradients (white
box). An ensemble (strongest) has a row for each of its runs, and one for every query's worst rank
over them and the other attacks on the same images. With --resume, whatever still has the same
inputs is kept: rows, and what a killed run had attacked. Several processes (accelerate launch,
torchrun) attack together. Under other ground truths than the original pairs (truths) every row has
its figures twice.

    fastmat eval --config clip-vit-b16-flickr30k-eval --out runs/eval
    fastmat eval --config clip-vit-b16-flickr30k-eval --out runs/transfer \\
      'surrogates={b32: {name: open_clip, architecture: ViT-B-32, pretrained: openai}}'
    fastmat eval --config clip-vit-b16-flickr30k-eval --out runs/sets 'sets=[runs/sga]' 'attacks={}'
    fastmat eval --config clip-vit-b16-coco-eccv-eval --out runs/coco-eccv-eval
    fastmat eval --pipeline --config pipeline --out runs/pipeline

The last judges vision experts, and an agent that calls them, by what attacks change of what they
say; with --pipeline the keys are others, and stand at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmat.build import resolve_device
from fastmat.cli import pipeline
from fastmat.cli.cells import Cells
from fastmat.cli.common import (
    MlmLoader,
    add_config_arguments,
    build_engine,
    check_out,
    keeping_rows,
    open_candidates,
    tell_candidates,
)
from fastmat.cli.config import EvalConfig
from fastmat.cli.ensembles import Ensembles
from fastmat.cli.keys import describe
from fastmat.cli.load import load_config, plain
from fastmat.cli.parser import Parser
from fastmat.cli.planning import SPEED_KEYS, check_models, plan_cells
from fastmat.cli.processes import is_first_process
from fastmat.cli.rows import Rows
from fastmat.cli.showcase import Showcase
from fastmat.cli.table import table
from fastmat.cli.together import stoppable, together
from fastmat.evaluation.adversarial_set import AdversarialSet
from fastmat.evaluation.results import Results, environment
from fastmat.report.html import write_report


def add_arguments(parser: Parser) -> None:
    add_config_arguments(parser, resume=True)
    parser.add_argument("--pipeline", action="store_true", help="judge vision experts, and an agent that calls them")
    parser.keys = lambda: f"{describe(EvalConfig)}\n\n{pipeline.keys()}"


def run(arguments: argparse.Namespace) -> None:
    if arguments.pipeline:
        pipeline.run(arguments)
        return
    config = load_config(EvalConfig, arguments.config, arguments.settings)
    check_out(arguments.out, resume=arguments.resume, sign="results.json")
    with keeping_rows(arguments.out):
        results = evaluate_models(config, arguments.out, resume=arguments.resume)
    if is_first_process():
        print(table(results.rows))
        print(arguments.out / "report.html")


def evaluate_models(config: EvalConfig, out: Path, *, resume: bool = False) -> Results:
    """Every row that `config` asks for, in `out/results.json`, and the report."""
    device = resolve_device(config.device)
    engine = build_engine(config.engine, device)
    check_models(config)
    cache = open_candidates(config.candidate_cache)
    with together() as processes, stoppable() as stop_asked:
        device = processes.device(device)
        mlm = MlmLoader(config.mlm, device)
        plan = plan_cells(config, mlm=mlm, engine=engine, cache=cache)
        dataset = plan.dataset
        sets = [AdversarialSet(folder, data=dataset.fingerprint()) for folder in config.sets]
        resolved = {key: value for key, value in plain(config).items() if key not in SPEED_KEYS}
        resolved["mlm_sha256"] = mlm.sha256
        if is_first_process():
            for label in config.truths:
                print(f"truths.{label}: {plan.truths[label].told}")
        empty = Results(rows=[], config=resolved, environment=environment(device))
        rows = Rows(out, empty=empty, resume=resume)
        shown = [label for label, (cell, *_) in plan.cells.items() if len(cell.rows) == dataset.n_images]
        shown += [stored.manifest.attack for stored in sets]
        showcase = Showcase(
            out, attack=shown[-1] if shown else None, count=config.examples, seed=config.seed, ids=dataset.ids
        )
        matrix = Cells(
            config=config,
            dataset=dataset,
            device=device,
            engine=engine,
            cells=plan.cells,
            ensembles=Ensembles(plan.ensembles, out / "ranks"),
            truths=plan.truths,
            sets=sets,
            out=out,
            rows=rows,
            showcase=showcase,
            processes=processes,
            stop_asked=stop_asked,
        )
        if config.surrogates:
            matrix.judge(config.surrogates, config.victims)
        else:
            for label, victim in config.victims.items():
                matrix.judge({label: victim.model}, {label: victim})
        counts = processes.all((cache.hits, cache.misses) if cache else (0, 0))
        if processes.first:
            matrix.finish()
            write_report(out)
            if rows.kept or matrix.found:
                total = rows.kept + rows.made
                print(f"inputs unchanged: {rows.kept} of {total} rows kept, {matrix.found} adversarial sets taken up")
            tell_candidates(counts)
        return processes.agreed(lambda: rows.results)
