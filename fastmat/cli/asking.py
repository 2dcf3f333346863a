"""Questions to pipelines about clean and attacked pictures; each attack is run once on each surrogate."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch

from fastmat.attacks.engine import Engine
from fastmat.build import Component
from fastmat.cli.common import progress
from fastmat.cli.encoded import Encoded
from fastmat.cli.ensembles import Variant
from fastmat.cli.fitting import FitSet, first_to_fit, fit_set
from fastmat.cli.load import plain
from fastmat.cli.making import drop_begun
from fastmat.cli.opening import Opening, batches_of
from fastmat.cli.pipeline_config import PipelineConfig
from fastmat.cli.sets import Sets
from fastmat.cli.together import Processes
from fastmat.data.retrieval import RetrievalSet
from fastmat.evaluation.adversarial_set import AdversarialSet
from fastmat.evaluation.manifest import Manifest, config_fingerprint
from fastmat.evaluation.results import Setting, to_json, write_atomic
from fastmat.evaluation.subset import draw_rows, picked
from fastmat.pipeline.agent import Agent
from fastmat.pipeline.ask import Asked, Pictures, Questions, agent_key, attacked_parts, clean_parts, expert_key
from fastmat.pipeline.results import AGENT, PipelineResults, PipelineRow
from fastmat.pipeline.rows import Case, Voice, rows_of
from fastmat.pipeline.shots import Shots
from fastmat.tasks.uncontrasted import check_surrogate, contrasts, no_context
from fastmat.types import ImageTransform


@dataclass(kw_only=True)
class Asking:
    """What all questions of a run share. attacks: of `single_variants`; sets: stored ones; empty: results without rows.

    Other processes than the first take part in attacks only.
    """

    config: PipelineConfig
    dataset: RetrievalSet
    device: torch.device
    engine: Engine
    attacks: Mapping[str, Sequence[Variant]]
    sets: Sequence[AdversarialSet]
    out: Path
    empty: PipelineResults
    questions: Questions
    processes: Processes
    stop_asked: Callable[[], bool]
    cases: list[Case] = field(default_factory=list, init=False)
    rows: list[PipelineRow] = field(default_factory=list, init=False)

    @cached_property
    def agent(self) -> Agent | None:
        said = self.config.endpoint
        if said is None:
            return None
        return Agent(endpoint=said.client(), question=said.question, max_steps=said.max_steps)

    @cached_property
    def heard(self) -> tuple[int, ...]:
        """The pictures that the agent is asked about."""
        wanted = self.config.endpoint.images if self.config.endpoint else None
        total = self.dataset.n_images
        return draw_rows(total, min(wanted or total, total), seed=self.config.seed)

    @property
    def twice(self) -> bool:
        """Whether the agent is asked about clean pictures a second time."""
        return self.config.endpoint is not None and self.config.endpoint.again

    @cached_property
    def shots(self) -> Shots:
        """The pictures of the report, among those that the agent is asked about."""
        count, seed = self.config.examples, self.config.seed
        rows = [self.heard[place] for place in draw_rows(len(self.heard), count, seed=seed)]
        chosen = f"{len(rows)} pictures drawn at random (seed {seed}), the same for every pipeline and attack."
        return Shots(self.out / "examples.json", rows=rows, ids=self.dataset.ids, chosen=chosen)

    @cached_property
    def right(self) -> list[set[str]]:
        """Per picture, the captions of its group."""
        own: dict[int, set[str]] = {}
        for group, captions in zip(self.dataset.group, self.dataset.captions, strict=True):
            own.setdefault(group, set()).update(captions)
        return [own[group] for group in self.dataset.group]

    @cached_property
    def making(self) -> Sets:
        return Sets(
            out=self.out,
            dataset=self.dataset,
            source={"data": plain(self.config.data), "limit": self.config.limit},
            engine=self.engine,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            processes=self.processes,
            stop_asked=self.stop_asked,
        )

    @cached_property
    def fit_on(self) -> FitSet | None:
        return fit_set(self.config, self.dataset, needed_by=first_to_fit(self.attacks))

    def judge(self, surrogates: Mapping[str, tuple[str, Component]], names: Sequence[str]) -> None:
        """Ask the pipelines `names`. surrogates: by name, where in the config they stand, and the model."""
        opening = Opening(config=self.config, dataset=self.dataset, device=self.device)
        surrogate_of = {
            name: opening.load(component, where=where)
            for name, (where, component) in surrogates.items()
            if self.attacks
        }
        for name, surrogate in surrogate_of.items():
            for label, ((_, attack, _), *_) in self.attacks.items():
                check_surrogate(attack, surrogate.model, label=f"{label} on {name}")
        opened = {name: opening.experts(name) for name in names} if self.processes.first else {}
        for name, surrogate in surrogate_of.items():
            self.ask(opened, self.clean(surrogate.batches.transform), again=True)
            for label, variants in self.attacks.items():
                for variant in variants:
                    if not self.attack(label, variant, name, surrogate, opened):
                        break
        for stored in self.sets if self.processes.first else ():
            self.judge_stored(stored, opened)

    def ask(self, opened: Mapping[str, Mapping[str, Asked]], pictures: Pictures, *, again: bool = False) -> None:
        """Everybody about all pictures. again: the agent a second time, where the config asks for that."""
        total = self.dataset.n_images
        for name, experts in opened.items():
            with progress(total * len(experts), f"{name}, {pictures.name}", unit="answer") as bar:
                self.questions.experts(name, experts, pictures, tick=bar.update)
            if self.agent is None:
                continue
            for repeated in (False, True) if again and self.twice else (False,):
                with progress(len(self.heard), f"{name}.{AGENT}, {pictures.name}", unit="picture") as bar:
                    self.questions.agent(
                        name, self.agent, experts, pictures, self.heard, again=repeated, tick=bar.update
                    )

    def attack(
        self,
        label: str,
        variant: Variant,
        name: str,
        surrogate: Encoded,
        opened: Mapping[str, Mapping[str, Asked]],
    ) -> bool:
        """One attack at one radius; whether another radius may give something else."""
        planned = self.making.planned(label, variant, name, surrogate, self.fit_on)
        plan, folder = planned.plan, planned.folder
        pictures = Pictures(
            key=planned.key,
            name=f"{label} on {name}, eps {plan.threat.eps:.4g}",
            parts=lambda: attacked_parts(AdversarialSet(folder)),
        )
        if self.processes.agreed(lambda: self.lacks(opened, pictures)):
            self.making.make(
                planned,
                surrogate,
                context=lambda: surrogate.context if contrasts(surrogate.model) else no_context(self.device),
            )
            if self.processes.first:
                self.shots.shoot(planned.key, picked(surrogate.batches, self.shots.rows), pictures.parts())
                self.ask(opened, pictures)
                if not self.config.keep_sets:
                    shutil.rmtree(folder)

        def moved() -> bool:
            self.note(plan, pictures, opened, origin=name if self.config.surrogates else "")
            return plan.threat.budgeted and self.rows[-1].max_distance > 0

        return self.processes.agreed(moved)

    def judge_stored(self, stored: AdversarialSet, opened: Mapping[str, Mapping[str, Asked]]) -> None:
        """A set that `fastmat attack` wrote."""
        made = stored.manifest
        self.ask(opened, self.clean(made.image_transform), again=True)
        pictures = Pictures(
            key=config_fingerprint({"stored": made.model_dump(mode="json")}),
            name=f"{made.attack} on {made.surrogate}, stored",
            parts=lambda: attacked_parts(stored),
        )
        if self.lacks(opened, pictures):
            batches = batches_of(self.config, self.dataset, made.image_transform)
            stored.check_budget(batches)
            self.shots.shoot(pictures.key, picked(batches, self.shots.rows), pictures.parts())
            self.ask(opened, pictures)
        self.note(made, pictures, opened, origin=made.surrogate)

    def lacks(self, opened: Mapping[str, Mapping[str, Asked]], pictures: Pictures) -> bool:
        """Whether somebody has not said everything about the pictures, or the report's have not been taken."""
        lacks, agent = self.questions.lacks, self.agent
        return self.shots.lacks(pictures.key) or any(
            any(lacks(expert_key(asked, pictures)) for asked in experts.values())
            or (agent is not None and lacks(agent_key(agent, experts, pictures), self.heard))
            for experts in opened.values()
        )

    def note(
        self, made: Manifest, pictures: Pictures, opened: Mapping[str, Mapping[str, Asked]], *, origin: str
    ) -> None:
        """A finished case of every pipeline; results and examples are written anew."""
        clean = self.clean(made.image_transform)
        everything = tuple(range(self.dataset.n_images))
        for name, experts in opened.items():
            own = {label: asked.weights == made.model for label, asked in experts.items()}
            voices = [
                Voice(
                    label=label,
                    before=expert_key(asked, clean),
                    after=expert_key(asked, pictures),
                    rows=everything,
                    white_box=own[label],
                    from_gallery=asked.expert.from_gallery,
                )
                for label, asked in experts.items()
            ]
            if self.agent is not None:
                key = partial(agent_key, self.agent, experts)
                voices.append(
                    Voice(
                        label=AGENT,
                        before=key(clean),
                        after=key(pictures),
                        again=key(clean, again=True) if self.twice else None,
                        rows=self.heard,
                        white_box=any(own.values()),
                    )
                )
            setting = Setting(
                surrogate=made.surrogate,
                victim=name,
                white_box=any(own.values()),
                defence=self.config.pipelines[name].defence,
                attack=made.attack,
                threat=made.threat,
                dataset=self.dataset.name,
                split=self.dataset.split,
                seed=made.seed,
                scoring="pipeline",
            )
            case = Case(setting=setting, pictures=pictures.key, origin=origin, voices=tuple(voices))
            reference = next((other for other in self.cases if other.same_attack(case)), None)
            journal, resamples = self.questions.journal, self.config.resamples
            self.rows += rows_of(case, reference, journal, captions=self.right, resamples=resamples)
            self.cases.append(case)
        self.write()

    def write(self, *, finished: bool = False) -> None:
        results = self.empty.model_copy(update={"rows": self.rows})
        write_atomic(self.out / "results.json", to_json(results))
        self.shots.write(self.cases, self.questions.journal, finished=finished)

    def finish(self) -> None:
        """Drop what earlier runs with other inputs have left: examples, sets that were only begun."""
        self.write(finished=True)
        drop_begun(self.out)

    def clean(self, transform: ImageTransform) -> Pictures:
        """The clean pictures as the attacked ones are cut and resized: nothing else but the attack may change an
        answer."""
        key = config_fingerprint({"clean": self.dataset.fingerprint(), "image_transform": asdict(transform)})
        return Pictures(
            key=key, name="clean", parts=lambda: clean_parts(batches_of(self.config, self.dataset, transform))
        )
