"""One model of the study under attack: with each correction, attacked through it, without it, and on another model."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmat.alignment.corrected import Texts, corrected, remembering
from fastmat.alignment.file import Correction
from fastmat.alignment.layers import image_layers, text_layers
from fastmat.alignment.misalignment import Misalignment, measure
from fastmat.alignment.oracle import Oracle
from fastmat.alignment.pairs import Site
from fastmat.attacks.base import Attack, frozen
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.engine import Engine, executing
from fastmat.attacks.masking import UnreliableGradient, gradient_warnings
from fastmat.cli.ensembles import Ensemble
from fastmat.data.loader import EvaluationBatches
from fastmat.evaluation.evaluate import (
    Attacked,
    Gallery,
    Measured,
    encode_gallery,
    gallery_context,
    gallery_ranks,
    run_attack,
)
from fastmat.evaluation.manifest import config_fingerprint
from fastmat.evaluation.metrics import Ranks, worst_case
from fastmat.evaluation.rerank import Rerank
from fastmat.evaluation.results import write_atomic
from fastmat.evaluation.stages import Counts, Stages
from fastmat.evaluation.subset import attacked_subset_ranks, picked
from fastmat.models.protocol import VisionLanguageModel
from fastmat.studies.channel_alignment_fitting import site_features
from fastmat.studies.channel_alignment_results import Layer, Removed
from fastmat.studies.estimates import estimates
from fastmat.studies.outcomes import read_outcome, write_outcome
from fastmat.types import AttackContext, Batch

Modules = Mapping[str, Correction]
MEASURED_WHOLE = ("projection output", "tokens to fusion")  # layers whose channels are listed


@dataclass(frozen=True, kw_only=True)
class Run:
    """An attack of the study. rows: the images it attacks; None: all. inputs: what its outcome depends on."""

    label: str
    attack: Attack
    rows: tuple[int, ...] | None
    inputs: str


@dataclass(kw_only=True)
class Subject:
    """A model, its data, and what was found of it so far; `key` says what decided its weights and its data."""

    label: str
    key: str
    model: VisionLanguageModel
    sites: tuple[Site, ...]
    rerank: Rerank | None
    batches: EvaluationBatches
    folder: Path
    say: Callable[[str], None]
    made: dict[str, list[Attacked]] = field(default_factory=dict)
    texts: Texts = field(default_factory=dict)

    def attacked(self, run: Run) -> list[Attacked]:
        """`run` on the model without a correction: made once, while the study runs."""
        if run.label not in self.made:
            self.say(f"{self.label}: {run.label}, without a correction")
            context = gallery_context(encode_gallery(self.model, self.batches))
            self.made[run.label] = list(run_attack(self.model, run.attack, self._batches(run), context))
        return self.made[run.label]

    def _batches(self, run: Run) -> EvaluationBatches:
        return self.batches if run.rows is None else picked(self.batches, run.rows)

    def outcomes(
        self,
        correction: str,
        modules: Modules,
        *,
        key: str,
        adaptive: Sequence[Run],
        handed: Sequence[tuple[str, Run, Subject]],
    ) -> dict[tuple[str, str], Ranks]:
        """(attack, made on) to ranks: clean data, attacks through the correction, and those that were `handed` over,
        (made on, attack, the subject that was attacked).

        key: of the correction. A file per outcome; one with the same inputs is not computed again.
        """
        wanted: dict[tuple[str, str], tuple[Run | None, Subject]] = {("none", ""): (None, self)}
        wanted |= {(run.label, "corrected"): (run, self) for run in adaptive}
        wanted |= {(run.label, made_on): (run, subject) for made_on, run, subject in handed}
        files, inputs = {}, {}
        for (attack, made_on), (run, subject) in wanted.items():
            files[attack, made_on] = self.folder / correction / f"{attack}-{made_on or 'clean'}.safetensors"
            inputs[attack, made_on] = config_fingerprint(
                {
                    "model": self.key,
                    "correction": key,
                    "attack": run and run.inputs,
                    "made_on": made_on,
                    "source": subject.key,
                    "rerank": self.rerank and [self.rerank.k, self.rerank.plus_cosine],
                }
            )
        found = {cell: read_outcome(files[cell], inputs=inputs[cell]) for cell in wanted}
        missing = [cell for cell, outcome in found.items() if outcome is None]
        if missing:
            self.say(f"{self.label}, {correction}: {', '.join('-'.join(filter(None, cell)) for cell in missing)}")
            victim = corrected(self.model, modules)
            with frozen(victim), executing(Engine(), victim):
                pass  # folding looks at a model once, with images of its own, which no oracle is told
            if "text" not in modules:
                remembering(victim, self.texts)
            gallery = encode_gallery(victim, self.told(self.batches, modules), rerank=self.rerank)
            for cell in missing:
                run, subject = wanted[cell]
                ranks = self.ranks(victim, gallery, modules, run, None if cell[1] == "corrected" else subject)
                stages = found[cell] = Stages(ranks={"itc": ranks})
                write_outcome(files[cell], stages, inputs=inputs[cell])
        return {cell: outcome.ranks["itc"] for cell, outcome in found.items() if outcome is not None}

    def ranks(
        self, victim: VisionLanguageModel, gallery: Gallery, modules: Modules, run: Run | None, source: Subject | None
    ) -> Ranks:
        """source: whose attacked data is handed over; None: the attack goes through the correction."""
        if run is None:
            return gallery_ranks(gallery)
        batches = self._batches(run)
        if source is not None:
            return self.judged(victim, gallery, self.paired(batches, source.attacked(run), modules), run)
        context = gallery_context(gallery)
        attacks: Iterable[Attack] = (run.attack,)
        if isinstance(run.attack, Ensemble):
            attacks = run.attack.runs.values()
            self.warn(victim, next(iter(self.told(batches, modules))), context, run)
        return worst_case(
            [
                self.judged(victim, gallery, run_attack(victim, attack, self.told(batches, modules), context), run)
                for attack in attacks
            ]
        )

    def warn(self, victim: VisionLanguageModel, batch: Batch, context: AttackContext, run: Run) -> None:
        """A gate may mask gradients: what a first batch shows of them."""
        draws = SeededDraws(run.attack.seed)
        with frozen(victim):
            batch = batch.to(victim.logit_scale.device)
            said = gradient_warnings(victim, batch, context, threat=run.attack.threat, draws=draws)
        for message in said.values():
            warnings.warn(f"{self.label}: {message}", UnreliableGradient, stacklevel=1)

    def judged(self, victim: VisionLanguageModel, gallery: Gallery, made: Iterable[Attacked], run: Run) -> Ranks:
        if run.rows is not None:
            return attacked_subset_ranks(victim, made, clean=gallery, rows=run.rows)[0]
        return gallery_ranks(encode_gallery(victim, Measured().watch(made), rerank=self.rerank))

    def told(self, batches: Iterable[Batch], modules: Modules) -> Iterator[Batch]:
        """The batches; an oracle hears what comes before it comes."""
        oracles = {site: module for site, module in modules.items() if isinstance(module, Oracle)}
        for batch in batches:
            if oracles:
                for site, features in site_features(self.model, batch, self.sites).items():
                    if site in oracles:
                        oracles[site].clean = features
            yield batch
        for oracle in oracles.values():
            oracle.clean = None

    def paired(self, batches: Iterable[Batch], made: Iterable[Attacked], modules: Modules) -> Iterator[Attacked]:
        for _, attacked in zip(self.told(batches, modules), made, strict=True):
            yield attacked

    def measured(
        self, run: Run, corrections: Mapping[str, Modules], *, keys: Mapping[str, str], seed: int, resamples: int
    ) -> tuple[list[Layer], list[Removed]]:
        """Features on clean and attacked test data, per layer; what every correction removes of the shift."""
        path = self.folder / f"misalignment-{run.label}.json"
        inputs = config_fingerprint(
            {"model": self.key, "attack": run.inputs, "corrections": dict(keys), "seed": seed, "resamples": resamples}
        )
        told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if told.get("inputs") != inputs:
            layers = list(self._layers(run))
            removed = list(self._removed(run, corrections, seed=seed, resamples=resamples))
            told = {
                "inputs": inputs,
                "layers": [layer.model_dump(mode="json") for layer in layers],
                "removed": [part.model_dump(mode="json") for part in removed],
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(told, allow_nan=False).encode())
        return [Layer.model_validate(layer) for layer in told["layers"]], [
            Removed.model_validate(part) for part in told["removed"]
        ]

    def _layers(self, run: Run) -> Iterator[Layer]:
        made = self.attacked(run)
        batches = list(self._batches(run))
        sides: list[tuple[str, Callable[..., dict[str, Tensor]], list[Any], list[Any]]] = [
            ("image", image_layers, [b.images for b in batches], [a.pairs.images for a in made]),
            ("text", text_layers, [b.texts for b in batches], [a.pairs.texts for a in made]),
        ]
        for encoder, layers, before, after in sides:
            if all(map(equal, before, after)):
                continue
            clean, adversarial = layers(self.model, before), layers(self.model, after)
            for name in clean:
                found = measure(clean[name], adversarial[name])
                yield layer_of(found, model=self.label, encoder=encoder, layer=name, attack=run.label)

    @torch.no_grad()
    def _removed(self, run: Run, corrections: Mapping[str, Modules], *, seed: int, resamples: int) -> Iterator[Removed]:
        """Sums over images, so that the interval is over images."""
        sums: dict[tuple[str, str], list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
        for batch, attacked in zip(self._batches(run), self.attacked(run), strict=True):
            clean = site_features(self.model, batch, self.sites)
            moved = site_features(self.model, attacked.pairs, self.sites)
            for label, modules in corrections.items():
                for site, module in modules.items():
                    z, z_adv = clean[site], moved[site]
                    if isinstance(module, Oracle):
                        module.clean = z
                    shift, left = length(z_adv - z), length(module(z_adv) - z)
                    sums.setdefault((label, site), []).append((shift - left, shift, length(module(z) - z), length(z)))
                    if isinstance(module, Oracle):
                        module.clean = None
        for (label, site), parts in sums.items():
            gone, shift, harm, size = (torch.cat(column).double().cpu() for column in zip(*parts, strict=True))
            if not bool(shift.any()):
                continue
            found = estimates(
                [{"removed": Counts(gone, shift), "clean_moved": Counts(harm, size)}], seed=seed, resamples=resamples
            )
            yield Removed(model=self.label, correction=label, attack=run.label, site=site, **found)


def equal(a: Tensor | Sequence[str], b: Tensor | Sequence[str]) -> bool:
    """Images, or captions."""
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def length(features: Tensor) -> Tensor:
    """[N] squared, over tokens too."""
    return features.flatten(1).square().sum(1)


def layer_of(found: Misalignment, *, model: str, encoder: str, layer: str, attack: str) -> Layer:
    """NaN, where a measure has no value, is null in JSON."""

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    whole = layer in MEASURED_WHOLE
    return Layer(
        model=model,
        encoder=encoder,
        layer=layer,
        attack=attack,
        channels=found.channels,
        explained_by_shift=None if math.isnan(found.explained_by_shift[0]) else found.explained_by_shift,
        explained_by_affine=number(found.explained_by_affine),
        mean_shift=number(found.mean_shift),
        wasserstein=number(found.wasserstein),
        uniformity_clean=number(found.uniformity_clean),
        uniformity_adversarial=number(found.uniformity_adversarial),
        rank_correlation=number(found.rank_correlation),
        by_channel=[number(value) for value in found.by_channel] if whole else [],
    )
