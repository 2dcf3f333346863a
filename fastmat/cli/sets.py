"""The adversarial sets of a run that attacks every image of its data: where each lies, and how it comes to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastmat.attacks.base import Attack
from fastmat.attacks.engine import Engine
from fastmat.cli.encoded import Encoded
from fastmat.cli.ensembles import Variant
from fastmat.cli.fitting import FitSet
from fastmat.cli.making import inputs_of, make_set, plan_set
from fastmat.cli.together import Processes
from fastmat.data.retrieval import RetrievalSet
from fastmat.evaluation.adversarial_set import MANIFEST
from fastmat.evaluation.manifest import Manifest, config_fingerprint
from fastmat.evaluation.results import read_json
from fastmat.types import AttackContext


class Planned(NamedTuple):
    """A set, made or not. key: of all that it depends on, which names its folder too. fit_on: what its attack learns
    from first; None: nothing."""

    plan: Manifest
    key: str
    folder: Path
    attack: Attack
    fit_on: FitSet | None


@dataclass(kw_only=True)
class Sets:
    """What the sets of a run share. source: where its clean images come from. stop_asked: whether Ctrl-C or SIGTERM
    came."""

    out: Path
    dataset: RetrievalSet
    source: dict[str, Any]
    engine: Engine
    seed: int
    batch_size: int
    processes: Processes
    stop_asked: Callable[[], bool]

    def planned(self, label: str, variant: Variant, name: str, surrogate: Encoded, fit_on: FitSet | None) -> Planned:
        """The attack `label` at one radius through the surrogate `name`."""
        component, attack, mlm_sha256 = variant
        fit_on = fit_on if attack.needs_fit else None
        inputs = inputs_of(
            component,
            attack,
            engine=self.engine,
            mlm_sha256=mlm_sha256,
            seed=self.seed,
            batch_size=self.batch_size,
            fit_on=fit_on,
        )
        plan = plan_set(
            weights=surrogate.weights,
            image_transform=surrogate.model.image_transform,
            surrogate=name,
            label=label,
            attack=attack,
            dataset=self.dataset,
            rows=range(self.dataset.n_images),
            config=inputs,
            seed=attack.seed,
            source=self.source,
        )
        key = config_fingerprint({"surrogate": surrogate.identity, **inputs})
        folder = self.out / "sets" / name / f"{label}-{plan.threat.eps:.4g}-{key[:12]}"
        return Planned(plan, key, folder, attack, fit_on)

    def make(self, planned: Planned, surrogate: Encoded, *, context: Callable[[], AttackContext]) -> None:
        """The set, unless it is there. context: what the attack contrasts with. Raises KeyboardInterrupt when it was
        asked to stop, with what is done on the disk."""

        def done() -> int:
            file = planned.folder / MANIFEST
            return read_json(file, Manifest).n_done if file.exists() else 0

        if self.processes.agreed(done) == planned.plan.n_images:
            return
        made = make_set(
            planned.folder,
            plan=planned.plan,
            surrogate=surrogate.model,
            attack=planned.attack,
            engine=self.engine,
            batches=surrogate.batches,
            rows=range(self.dataset.n_images),
            context=context,
            fit_on=planned.fit_on,
            shard_images=self.batch_size,
            processes=self.processes,
            stop_asked=self.stop_asked,
        )
        if made < planned.plan.n_images:
            raise KeyboardInterrupt
