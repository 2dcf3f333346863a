"""Vision experts, and an agent that calls them, under attack: `fastmat eval --pipeline`.

Clean and attacked pictures go through experts (retrieval, tagging, captioning, grounding) and, where an
OpenAI-compatible endpoint is configured, through an agent that calls them. Writes answers.jsonl (every
answer as it came), results.json, examples.json and report.html.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from fastmat.build import EXPERTS, Component, build_data, check_weights, resolve_device
from fastmat.cli.asking import Asking
from fastmat.cli.common import MlmLoader, build_engine, check_out, keeping_rows, open_candidates, tell_candidates
from fastmat.cli.keys import component_help, default_text, keys_of, type_name, wrapped
from fastmat.cli.load import load_config, plain
from fastmat.cli.pipeline_config import PipelineConfig
from fastmat.cli.planning import SPEED_KEYS, single_variants
from fastmat.cli.processes import is_first_process
from fastmat.cli.together import stoppable, together
from fastmat.evaluation.adversarial_set import AdversarialSet
from fastmat.evaluation.results import environment
from fastmat.pipeline.ask import Questions
from fastmat.pipeline.journal import Journal
from fastmat.pipeline.results import PipelineResults
from fastmat.report.pipeline import table, write_pipeline_report

ANSWERS = "answers.jsonl"


def keys() -> str:
    """The keys of its config; models, attacks and data sets have their arguments above."""
    lines = ["with --pipeline, config keys:", ""]
    for key, annotation, default, meaning in keys_of(PipelineConfig):
        lines += wrapped(f"{key}: {type_name(annotation)}{default_text(default)}", 2) + wrapped(meaning, 6)
    lines += ["", "experts:"]
    return "\n".join([*lines, *(line for name, at in EXPERTS.items() for line in component_help(name, at))])


def run(arguments: argparse.Namespace) -> None:
    config = load_config(PipelineConfig, arguments.config, arguments.settings)
    check_out(arguments.out, resume=arguments.resume, sign=ANSWERS)
    with keeping_rows(arguments.out, ANSWERS):
        results = ask_pipelines(config, arguments.out)
    if is_first_process():
        print(table(results.rows))
        print(arguments.out / "report.html")


def ask_pipelines(config: PipelineConfig, out: Path) -> PipelineResults:
    """Every row that `config` asks for, in `out/results.json`, and the report; no question of `out/answers.jsonl` is
    asked again."""
    device = resolve_device(config.device)
    engine = build_engine(config.engine, device)
    for where, component in models_of(config):
        check_weights(component, where=where)
    cache = open_candidates(config.candidate_cache)
    with together() as processes, stoppable() as stop_asked:
        device = processes.device(device)
        mlm = MlmLoader(config.mlm, device)
        attacks = single_variants(config, mlm=mlm, cache=cache)
        dataset = build_data(config.data, limit=config.limit)
        resolved = {key: value for key, value in plain(config).items() if key not in SPEED_KEYS}
        resolved["mlm_sha256"] = mlm.sha256
        journal = processes.agreed(lambda: Journal(out / ANSWERS))
        asking = Asking(
            config=config,
            dataset=dataset,
            device=device,
            engine=engine,
            attacks=attacks,
            sets=[AdversarialSet(folder, data=dataset.fingerprint()) for folder in config.sets],
            out=out,
            empty=PipelineResults(
                question=config.endpoint.question if config.endpoint else None,
                rows=[],
                config=resolved,
                environment=environment(device),
            ),
            questions=Questions(
                journal=journal,
                ids=dataset.ids,
                phrases=[captions[0] for captions in dataset.captions],
                device=device,
                at_once=config.batch_size,
                stop_asked=stop_asked,
            ),
            processes=processes,
            stop_asked=stop_asked,
        )
        if config.surrogates:
            named = {name: (f"surrogates.{name}", model) for name, model in config.surrogates.items()}
            asking.judge(named, list(config.pipelines))
        else:
            for name, pipeline in config.pipelines.items():
                label, first = next(iter(pipeline.experts.items()))
                where = f"pipelines.{name}.experts.{label}.model"
                asking.judge({f"{name}.{label}": (where, first.model)}, [name])
        counts = processes.all((cache.hits, cache.misses) if cache else (0, 0))
        if processes.first:
            asking.finish()
            write_pipeline_report(out)
            if journal.taken_over:
                print(f"{journal.taken_over:,} answers of an earlier run were at hand")
            tell_candidates(counts)
        return processes.agreed(lambda: asking.empty.model_copy(update={"rows": asking.rows}))


def models_of(config: PipelineConfig) -> Iterator[tuple[str, Component]]:
    """Every model, and where it stands."""
    for name, pipeline in config.pipelines.items():
        for label, chosen in pipeline.experts.items():
            yield f"pipelines.{name}.experts.{label}.model", chosen.model
    for name, model in config.surrogates.items():
        yield f"surrogates.{name}", model
