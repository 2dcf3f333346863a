"""Adversarial sets in the making: planned by what they depend on, taken up where they stopped, by several processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastmat.attacks.base import Attack
from fastmat.attacks.engine import Engine
from fastmat.build import Component, build_attack
from fastmat.cli.common import MlmLoader, progress
from fastmat.cli.fitting import FitSet, fitted
from fastmat.cli.load import plain
from fastmat.cli.table import radius
from fastmat.cli.together import Processes
from fastmat.data.loader import EvaluationBatches
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError
from fastmat.evaluation.adversarial_set import MANIFEST, AdversarialSetWriter
from fastmat.evaluation.evaluate import Attacked, run_attack
from fastmat.evaluation.manifest import Manifest, config_fingerprint, sha256
from fastmat.evaluation.results import Threat, read_json
from fastmat.evaluation.subset import pick, picked
from fastmat.models.protocol import VisionLanguageModel
from fastmat.text.candidate_cache import CandidateCache
from fastmat.types import AttackContext, ImageTransform, ThreatModel


def attack_with_hash(
    component: Component,
    *,
    threat: ThreatModel,
    mlm: MlmLoader,
    seed: int,
    candidate_cache: CandidateCache | None = None,
    where: str,
) -> tuple[Attack, str | None]:
    """An attack, and the hash of the masked language model if it asked for one."""
    asked = False

    def load() -> object:
        nonlocal asked
        asked = True
        return mlm()

    attack = build_attack(component, threat=threat, mlm=load, seed=seed, candidate_cache=candidate_cache, where=where)
    return attack, mlm.sha256 if asked else None


def inputs_of(
    component: Component,
    attack: Attack,
    *,
    engine: Engine,
    mlm_sha256: str | None,
    seed: int,
    batch_size: int,
    fit_on: FitSet | None,
) -> dict[str, Any]:
    """What an attack makes depends on, besides surrogate and data."""
    inputs: dict[str, Any] = {
        "attack": plain(component),
        "files": files_of(component),
        "threat": asdict(attack.threat),
        "seed": seed,
        "mlm_sha256": mlm_sha256,
        "precision": engine.precision,
    }
    if not attack.splits:
        inputs["batch_size"] = batch_size
    return inputs if fit_on is None else {**inputs, **fit_on.inputs()}


def files_of(component: Component) -> dict[str, str]:
    """The files that an attack or a part of it names, and the sha256 of what is in them."""
    paths = [Path(text) for text in texts_in(plain(component))]
    return {str(path): sha256(path.read_bytes()) for path in paths if path.is_file()}


def texts_in(value: Any) -> Iterator[str]:
    """The strings at any depth of a config."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)


def plan_set(
    *,
    weights: str,
    image_transform: ImageTransform,
    surrogate: str,
    label: str,
    attack: Attack,
    dataset: RetrievalSet,
    rows: Sequence[int],
    config: dict[str, Any],
    seed: int,
    source: dict[str, Any],
) -> Manifest:
    """The manifest of a set of which nothing is made yet.

    weights, image_transform: of the surrogate. surrogate, label: what tables call it and the attack. rows: the images
    to attack. config: what the set depends on besides these and the data. source: where the clean images come from.
    """
    threat = attack.threat
    whole = len(rows) == dataset.n_images
    return Manifest(
        model=weights,
        data=(dataset if whole else pick(dataset, rows)).fingerprint(),
        config_sha256=config_fingerprint(config),
        config=config,
        surrogate=surrogate,
        image_transform=image_transform,
        attack=label,
        threat=Threat(eps=threat.eps, norm=threat.norm, max_words=threat.max_words, budgeted=attack.budgeted),
        dataset=dataset.name,
        split=dataset.split,
        seed=seed,
        n_images=len(rows),
        source={**source, "rows": None if whole else list(rows)},
    )


def make_set(
    folder: Path,
    *,
    plan: Manifest,
    surrogate: VisionLanguageModel,
    attack: Attack,
    engine: Engine,
    batches: EvaluationBatches,
    rows: Sequence[int],
    context: Callable[[], AttackContext],
    fit_on: FitSet | None,
    shard_images: int,
    processes: Processes,
    stop_asked: Callable[[], bool],
) -> int:
    """Write, or finish, the set of the images `rows`; how many of them are in finished shards.

    fit_on: what the attack learns from before; None: nothing, or it has. Every process attacks its share of the same
    batches, so that their number changes nothing; the first one writes.
    Once one of them is asked to stop, all stop after the batch at hand.
    """
    writer: AdversarialSetWriter | None = None

    def begin() -> int:
        nonlocal writer
        ids = [batches.dataset.ids[row] for row in rows]
        writer = AdversarialSetWriter(folder, plan=plan, ids=ids, shard_images=shard_images)
        return writer.n_done

    clean = context()  # before anything is written: it reads all the data
    done = processes.agreed(begin)
    if fit_on is not None:
        fitted(attack, fit_on, surrogate, folder, engine=engine, processes=processes, stop_asked=stop_asked)
    share = picked(batches, rows[done:], share=processes.rank, of=processes.count)
    mine = run_attack(surrogate, attack, share, clean, engine=engine)
    captions = [len(batches.dataset.captions[row]) for row in rows]
    title = f"{plan.attack} on {plan.surrogate}, {radius(plan.threat)}"
    with writer or nullcontext(), progress(sum(captions), title) as bar:
        bar.update(sum(captions[:done]))
        place = done
        for _ in range(done, len(rows), batches.batch_size * processes.count):
            part, problem = next_of(mine)
            told = processes.all((stop_asked(), problem))
            for error in filter(None, (other for _, other in told)):
                raise error
            for attacked in filter(None, processes.to_first(part)):
                assert writer is not None
                writer.add(at_place(attacked, place))
                place += len(attacked.pairs)
                bar.update(len(attacked.sources))
            if any(stop for stop, _ in told):
                break
    return processes.agreed(lambda: writer.n_done if writer else 0)


def next_of(attacked: Iterator[Attacked]) -> tuple[Attacked | None, UserError | None]:
    """The next batch, if there is one, or what the user should know."""
    try:
        return next(attacked, None), None
    except UserError as error:
        return None, error


def at_place(attacked: Attacked, place: int) -> Attacked:
    """The same, its images counted from `place` on: an adversarial set of some images is a set of its own."""
    index = torch.arange(place, place + len(attacked.pairs))
    return replace(attacked, pairs=replace(attacked.pairs, index=index))


def drop_begun(out: Path) -> None:
    """Remove the sets below `out` that were only begun: nobody wants them any more once all rows stand."""
    for file in out.glob(f"sets/*/*/{MANIFEST}"):
        begun = read_json(file, Manifest)
        if begun.n_done < begun.n_images:
            shutil.rmtree(file.parent)
    for folder in (*out.glob("sets/*"), out / "sets"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
