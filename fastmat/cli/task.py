"""Judge models on other tasks than retrieval: grounding, captioning, entailment, zero-shot classes.

Clean and attacked; writes results.json, examples.json and report.html. Every attack is run once on
each surrogate and judged on all victims; without surrogates, each victim is attacked through its
own gradients (white box). With --resume, whatever still has the same inputs is kept: rows, and what
a killed run had attacked. Several processes (accelerate launch, torchrun) attack together.

    fastmat task --config albef-refcoco-task --out runs/grounding
    fastmat task --config albef-snli-ve-task --out runs/entailment
    fastmat task --config blip-coco-captions-task --out runs/captioning
    fastmat task --config clip-zero-shot-task --out runs/zero-shot
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from fastmat.build import build_task, resolve_device
from fastmat.cli.common import (
    MlmLoader,
    add_config_arguments,
    build_engine,
    check_out,
    keeping_rows,
    open_candidates,
    tell_candidates,
)
from fastmat.cli.config import TaskConfig
from fastmat.cli.judging import Judging
from fastmat.cli.keys import describe
from fastmat.cli.load import load_config, plain
from fastmat.cli.parser import Parser
from fastmat.cli.planning import SPEED_KEYS, check_models, single_variants
from fastmat.cli.processes import is_first_process
from fastmat.cli.rows import Rows
from fastmat.cli.together import stoppable, together
from fastmat.evaluation.results import environment
from fastmat.report.tasks import table, write_task_report
from fastmat.tasks.results import TaskResults


def add_arguments(parser: Parser) -> None:
    add_config_arguments(parser, resume=True)
    parser.keys = partial(describe, TaskConfig)


def run(arguments: argparse.Namespace) -> None:
    config = load_config(TaskConfig, arguments.config, arguments.settings)
    check_out(arguments.out, resume=arguments.resume, sign="results.json")
    with keeping_rows(arguments.out):
        results = judge_task(config, arguments.out, resume=arguments.resume)
    if is_first_process():
        print(table(results.rows))
        print(arguments.out / "report.html")


def judge_task(config: TaskConfig, out: Path, *, resume: bool = False) -> TaskResults:
    """Every row that `config` asks for, in `out/results.json`, and the report."""
    device = resolve_device(config.device)
    engine = build_engine(config.engine, device)
    check_models(config)
    cache = open_candidates(config.candidate_cache)
    with together() as processes, stoppable() as stop_asked:
        device = processes.device(device)
        mlm = MlmLoader(config.mlm, device)
        attacks = single_variants(config, mlm=mlm, cache=cache)
        task = build_task(config.task)
        resolved = {key: value for key, value in plain(config).items() if key not in SPEED_KEYS}
        resolved["mlm_sha256"] = mlm.sha256
        empty = TaskResults(task=task.name, rows=[], config=resolved, environment=environment(device))
        judging = Judging(
            config=config,
            task=task,
            device=device,
            engine=engine,
            attacks=attacks,
            out=out,
            rows=Rows(out, empty=empty, resume=resume),
            processes=processes,
            stop_asked=stop_asked,
        )
        if config.surrogates:
            judging.judge(config.surrogates, config.victims)
        else:
            for label, victim in config.victims.items():
                judging.judge({label: victim.model}, {label: victim})
        counts = processes.all((cache.hits, cache.misses) if cache else (0, 0))
        if processes.first:
            judging.finish()
            write_task_report(out)
            if judging.rows.kept:
                print(f"inputs unchanged: {judging.rows.kept} of {judging.rows.kept + judging.rows.made} rows kept")
            tell_candidates(counts)
        return processes.agreed(lambda: judging.rows.results)
