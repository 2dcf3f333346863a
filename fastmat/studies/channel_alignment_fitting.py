"""Calibration pairs of one model, and the corrections that are made of them; each is kept on disk and made once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmat.alignment.corrected import Texts, check_sites, corrected, remembering
from fastmat.alignment.dynamic import Gate, randomised, size_of, summaries, with_inputs
from fastmat.alignment.file import Correction, read_corrections, write_corrections, written_for
from fastmat.alignment.oracle import Oracle
from fastmat.alignment.pairs import Pairs, Site
from fastmat.alignment.static import fit_affine, fit_subspace, shift_basis
from fastmat.alignment.training import GateSettings, restoring_loss, train_gates
from fastmat.attacks.base import Attack
from fastmat.evaluation.evaluate import encode_gallery, gallery_context, run_attack
from fastmat.evaluation.manifest import config_fingerprint
from fastmat.evaluation.results import write_atomic
from fastmat.evaluation.subset import PickedBatches
from fastmat.models.protocol import VisionLanguageModel
from fastmat.studies.channel_alignment_config import Correction as Choice
from fastmat.types import Batch

NONE = "none"


@torch.no_grad()
def site_features(model: VisionLanguageModel, batch: Batch, sites: Iterable[Site]) -> dict[str, Tensor]:
    """What a correction at each site would get of `batch`: image [B, C], tokens [B, L, C], text [T, C]."""
    batch = batch.to(model.logit_scale.device)
    found: dict[str, Tensor] = {}
    if not {"image", "tokens"}.isdisjoint(sites):
        state = model.encode_image(batch.images)
        found["image"] = state.embeds
        if state.tokens is not None:
            found["tokens"] = state.tokens
    if "text" in sites:
        found["text"] = model.encode_text(model.tokenize(batch.texts).to(model.logit_scale.device)).embeds
    return {site: found[site] for site in sites}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the corrections of one model and seed are made of.

    key: sha256 of all that decides the pairs. name: of the model. batches: the calibration images. attack: makes them
    adversarial. folder: where corrections are kept. gate: settings of every gate.
    """

    model: VisionLanguageModel
    key: str
    name: str
    sites: tuple[Site, ...]
    batches: PickedBatches
    attack: Attack
    gate: GateSettings
    folder: Path
    seed: int

    def corrections(self, choices: Mapping[str, Choice]) -> dict[str, dict[str, Correction]]:
        """Label to modules by site, and "none" to none; what is not on disk is made, and its loss written beside it."""
        assert isinstance(self.model, nn.Module)
        check_sites(self.model, self.sites)
        made: dict[str, dict[str, Correction]] = {NONE: {}}
        for label in sorted(choices, key=lambda label: choices[label].of is not None):  # what refers comes last
            choice, path, inputs = choices[label], self.folder / f"{label}.safetensors", self.inputs(label, choices)
            if choice.kind == "file" or written_for(path) != inputs:
                modules = self.made(choice, made)
                write_corrections(path, modules, inputs=inputs)
                self._keep_loss(label, modules)
            made[label] = read_corrections(path, widths=self.widths)
            for module in made[label].values():
                module.to(self.model.logit_scale.device)
        if NONE not in self.losses():
            self._keep_loss(NONE, {})
        return {label: made[label] for label in (NONE, *choices)}

    def inputs(self, label: str, choices: Mapping[str, Choice]) -> str:
        """sha256 of all that a correction depends on."""
        choice = choices[label]
        told = {
            "calibration": self.key,
            "kind": choice.model_dump(mode="json", exclude={"of"}),
            "of": choice.of and self.inputs(choice.of, choices),
            "gate": vars(self.gate) if "gate" in choice.kind else None,
        }
        if choice.path is not None:
            told["file"] = written_for(self.path_of(choice.path)) or ""
        return config_fingerprint(told)

    def path_of(self, path: Path) -> Path:
        return Path(str(path).replace("{model}", self.name))

    def made(self, choice: Choice, others: Mapping[str, Mapping[str, Correction]]) -> dict[str, Correction]:
        """Modules by site."""
        if choice.kind == "file":
            assert choice.path is not None
            return read_corrections(self.path_of(choice.path), widths=self.widths)
        if choice.kind in ("gate", "constant_gate"):
            return dict(self.trained(constant=choice.kind == "constant_gate"))
        return {site: self.made_at(choice, pairs, others) for site, pairs in self.pairs.items()}

    def made_at(self, choice: Choice, pairs: Pairs, others: Mapping[str, Mapping[str, Correction]]) -> Correction:
        if choice.kind == "mean" or choice.kind == "mean_variance" or choice.kind == "least_squares":
            return fit_affine(pairs, method=choice.kind, shrinkage=choice.shrinkage)
        if choice.kind == "subspace":
            return fit_subspace(pairs, rank=choice.rank or 1)
        if choice.kind == "oracle":
            basis = None if choice.rank is None else shift_basis(pairs, rank=choice.rank)
            return Oracle(width=pairs.width, basis=basis)
        gate = others[choice.of or ""][pairs.site]
        assert isinstance(gate, Gate)
        if choice.kind == "shuffled_gate":
            # Half a set further on, so that no calibration image meets itself.
            return with_inputs(gate, summaries(pairs.clean).roll(len(pairs.clean) // 2, 0))
        return randomised(gate, torch.cat([pairs.clean, pairs.adversarial]), seed=self.seed)

    def trained(self, *, constant: bool) -> dict[str, Gate]:
        """Gates by site, attacked anew in every round; constant: of one input, so static ones."""
        gates = {
            site: Gate(
                width=pairs.width,
                reduction=self.gate.reduction,
                gamma=self.gate.gamma,
                unit=size_of(pairs.clean),
                inputs=summaries(pairs.clean).mean(0, keepdim=True) if constant else None,
                seed=self.seed,
            ).to(pairs.clean.device)
            for site, pairs in self.pairs.items()
        }
        rounds, texts = iter(range(self.gate.rounds)), Texts()

        def renew() -> dict[str, Pairs]:
            if next(rounds) == 0:
                return self.pairs
            surrogate = corrected(self.model, gates)
            return self.attacked(surrogate if "text" in gates else remembering(surrogate, texts))

        train_gates(gates, renew, self.gate, logit_scale=float(self.model.logit_scale.detach()), seed=self.seed)
        return gates

    @cached_property
    def pairs(self) -> dict[str, Pairs]:
        """By site, made on the model without a correction."""
        return self.attacked(self.model)

    @cached_property
    def widths(self) -> dict[str, int]:
        """By site, of the model's features."""
        first = next(iter(self.batches))
        return {site: z.shape[-1] for site, z in site_features(self.model, first, self.sites).items()}

    def attacked(self, surrogate: VisionLanguageModel) -> dict[str, Pairs]:
        """Pairs by site: features of the model itself, of images and captions that `surrogate` was attacked with."""
        parts = [self._features(batch, pairs) for batch, pairs in self._attacked_batches(surrogate)]
        return {
            site: Pairs(
                site=site,
                clean=torch.cat([clean[site] for clean, *_ in parts]),
                adversarial=torch.cat([adversarial[site] for _, adversarial, *_ in parts]),
                text_features=torch.cat([texts for *_, texts, _ in parts]) if site == "image" else None,
                group=torch.cat([group for *_, group in parts]) if site == "image" else None,
            )
            for site in self.sites
        }

    def _attacked_batches(self, surrogate: VisionLanguageModel) -> Iterator[tuple[Batch, Batch]]:
        context = gallery_context(encode_gallery(surrogate, self.batches))
        made = run_attack(surrogate, self.attack, self.batches, context)
        for batch, attacked in zip(self.batches, made, strict=True):
            yield batch, attacked.pairs

    @torch.no_grad()
    def _features(self, batch: Batch, pairs: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
        device = self.model.logit_scale.device
        first = torch.searchsorted(batch.txt2img, torch.arange(len(batch))).tolist()
        tokens = self.model.tokenize([batch.texts[t] for t in first]).to(device)
        return (
            site_features(self.model, batch, self.sites),
            site_features(self.model, pairs, self.sites),
            self.model.encode_text(tokens).features,
            batch.group.to(device),
        )

    def losses(self) -> dict[str, float]:
        """Label to the loss on the calibration pairs, of what was made so far with these pairs."""
        path = self.folder / "losses.json"
        told = json.loads(path.read_text()) if path.exists() else {}
        return dict(told["losses"]) if told.get("inputs") == self.key else {}

    @torch.no_grad()
    def _keep_loss(self, label: str, modules: Mapping[str, Correction]) -> None:
        values = []
        for site, pairs in self.pairs.items():
            module = modules.get(site, nn.Identity())
            if isinstance(module, Oracle):
                return  # it would have to be told every batch, and its loss is no news
            size = pairs.clean.square().sum(-1).mean()
            values.append(float(restoring_loss(module, pairs.clean, pairs.adversarial) / size))
        told = {"inputs": self.key, "losses": {**self.losses(), label: sum(values) / len(values)}}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / "losses.json", json.dumps(told).encode())
