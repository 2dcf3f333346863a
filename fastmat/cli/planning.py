"""What an evaluation will do, before it does anything: each attack at each radius, on which images of which data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmat.attacks.base import Attack
from fastmat.attacks.engine import Engine
from fastmat.build import build_data, build_threat, build_truths, check_weights
from fastmat.cli.common import MlmLoader
from fastmat.cli.config import EvalConfig, TaskConfig
from fastmat.cli.ensembles import Ensemble, Variant, split
from fastmat.cli.fitting import FitSet, first_to_fit, fit_set
from fastmat.cli.making import attack_with_hash, inputs_of
from fastmat.cli.pipeline_config import PipelineConfig
from fastmat.data.retrieval import RetrievalSet
from fastmat.data.truth import Truth
from fastmat.errors import UserError
from fastmat.evaluation.subset import draw_rows
from fastmat.text.candidate_cache import CandidateCache
from fastmat.types import ThreatModel

# Keys that decide nothing about a row.
SPEED_KEYS = ("batch_size", "workers", "image_cache", "candidate_cache", "keep_sets")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One attack at one radius, what its outcome depends on besides surrogate and data, and the images it attacks.

    fit_on: what it learns from before, for each surrogate anew.
    """

    label: str
    attack: Attack
    inputs: Mapping[str, Any]
    rows: tuple[int, ...]
    fit_on: FitSet | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """dataset: what is judged. cells: label to the same attack at every radius, the main one first; an ensemble's runs
    stand under labels of their own. ensembles: label to the labels of its runs. truths: label to ground truth, each
    beside the original pairs."""

    dataset: RetrievalSet
    truths: Mapping[str, Truth]
    cells: Mapping[str, Sequence[Cell]]
    ensembles: Mapping[str, Sequence[str]]


def check_models(config: EvalConfig | TaskConfig) -> None:
    """Raise UserError for a file of weights that is not there, before anything is loaded."""
    for label, victim in config.victims.items():
        check_weights(victim.model, where=f"victims.{label}.model")
    for label, model in config.surrogates.items():
        check_weights(model, where=f"surrogates.{label}")


def plan_cells(config: EvalConfig, *, mlm: MlmLoader, engine: Engine, cache: CandidateCache | None) -> Plan:
    """Raises UserError on whatever of `config` cannot be done, where that is known before a model is loaded."""
    built = attack_variants(config, mlm=mlm, cache=cache)
    parts = split(built, config.subset)
    dataset = build_data(config.data, limit=config.limit)
    for label, count in config.subset.items():
        if count > dataset.n_images:
            told = f"{dataset.name}/{dataset.split} has {dataset.n_images} images, cannot take {count}"
            raise UserError(f"subset.{label}: {told}")
    smaller = min(dataset.n_images, dataset.n_captions)
    for label, victim in config.victims.items():
        if victim.rerank_k is not None and victim.rerank_k > smaller:
            told = f"{dataset.name}/{dataset.split} has {dataset.n_images} images and {dataset.n_captions} captions"
            raise UserError(f"victims.{label}.rerank_k must be at most {smaller}, got {victim.rerank_k}: {told}")
    fit_on = fit_set(config, dataset, needed_by=first_to_fit(built))

    def cell(label: str, variant: Variant) -> Cell:
        component, attack, mlm_sha256 = variant
        learns_from = fit_on if attack.needs_fit else None
        inputs = inputs_of(
            component,
            attack,
            engine=engine,
            mlm_sha256=mlm_sha256,
            seed=config.seed,
            batch_size=config.batch_size,
            fit_on=learns_from,
        )
        count = parts.subset.get(label, dataset.n_images)
        rows = draw_rows(dataset.n_images, count, seed=config.seed)
        return Cell(label=label, attack=attack, inputs=inputs, rows=rows, fit_on=learns_from)

    return Plan(
        dataset=dataset,
        truths=build_truths(config.truths, dataset),
        cells={label: [cell(label, variant) for variant in variants] for label, variants in parts.attacks.items()},
        ensembles=parts.ensembles,
    )


def attack_variants(
    config: EvalConfig | TaskConfig | PipelineConfig, *, mlm: MlmLoader, cache: CandidateCache | None
) -> dict[str, list[Variant]]:
    """Label to the same attack at every radius, the main one first."""
    made: dict[str, list[Variant]] = {}
    for label, component in config.attacks.items():
        for threat in radii(config):
            attack, sha256 = attack_with_hash(
                component, threat=threat, mlm=mlm, seed=config.seed, candidate_cache=cache, where=f"attacks.{label}"
            )
            made.setdefault(label, []).append((component, attack, sha256))
    return made


def single_variants(
    config: TaskConfig | PipelineConfig, *, mlm: MlmLoader, cache: CandidateCache | None
) -> dict[str, list[Variant]]:
    """The same. Raises UserError for an ensemble: its row would be the worst case over its runs, which only retrieval
    has."""
    made = attack_variants(config, mlm=mlm, cache=cache)
    for label, ((component, attack, _), *_) in made.items():
        if isinstance(attack, Ensemble):
            raise UserError(
                f"attacks.{label}: {component.name} is several attacks; name those that you want, one by one"
            )
    return made


def radii(config: EvalConfig | TaskConfig | PipelineConfig) -> list[ThreatModel]:
    """The threat model of `threat`, then the others of `eps`."""
    threat = build_threat(config.threat)
    more = [build_threat({**config.threat, "eps": eps}, where="eps") for eps in config.eps]
    return [threat, *(other for other in more if other != threat)]
