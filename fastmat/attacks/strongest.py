"""`strongest`: an ensemble of attacks for honest evaluation of hardened models."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fastmat.attacks.alternating import Alternating, Found, merge
from fastmat.attacks.base import Attack, text_features
from fastmat.attacks.cmi import CMI
from fastmat.attacks.co_attack import CoAttack
from fastmat.attacks.dra import DRA
from fastmat.attacks.draws import Draws
from fastmat.attacks.masking import UnreliableGradient, black_box_warning, gradient_warnings
from fastmat.attacks.objectives import CosineToOwn, KLFromClean, Objective
from fastmat.attacks.rivals import Rivals, standing
from fastmat.attacks.sa_aet import SAAET
from fastmat.attacks.sga import SGA
from fastmat.attacks.square import Square
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.text.candidates import CandidateSource
from fastmat.types import AttackContext, Batch, ThreatModel

Ascended = Literal["contrastive", "margin_i2t", "margin_t2i", "cosine", "kl"]
Included = Literal["sga", "co_attack", "cmi", "dra", "sa_aet", "square"]

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "contrastive": lambda: Rivals(form="contrastive"),
    "margin_i2t": lambda: Rivals(directions="i2t"),
    "margin_t2i": lambda: Rivals(directions="t2i"),
    "cosine": CosineToOwn,
    "kl": KLFromClean,
}
ON_WORDS: dict[str, Callable[..., Attack]] = {
    "sga": SGA,
    "co_attack": CoAttack,
    "cmi": CMI,
    "dra": DRA,
    "sa_aet": SAAET,
}


class Strongest(Attack):
    """Several runs, each with a gallery of its own; a query survives only if it survives every one of them.

    runs: `Alternating` (APGD and the text search in turn, over all captions of an image) on each of `objectives`, then
    the attacks in `include` with the constants of their papers. `fastmat eval` makes and judges each run by itself and
    takes, query by query, the worst rank over all of them and over the other attacks of the evaluation (`worst_case`).
    Where one gallery has to do (`fastmat attack`, a call from Python), each image keeps, with its captions, the run
    that stands best against the frozen context (`Standing`): at most as strong as the runs together.

    objectives: "contrastive", "margin_i2t", "margin_t2i" (`Rivals`), "cosine" (SGA's), "kl" (Co-Attack's).
    include: "sga", "co_attack", "cmi", "dra", "sa_aet", "square".
    steps, restarts, rounds, beam: of `Alternating`. n_queries: of Square; published for hardened models: 5000. All but
        the 100 steps are this project's choice.

    Budget by default (`passes`, `queries`): for each image and objective, at most 3 rounds of 2 restarts of 100 steps,
    610 forwards and 600 backwards, 2440 and 2400 over the four; 1000 queries of Square; what the
    others take; `gradient_warnings` once per batch. Every single substitution is encoded once per run. Slow: meant for
    some images against the full gallery (`subset`).

    Warns (`UnreliableGradient`), once per kind, when the model is random, its gradient is zero or masked.
    Raises UserError without any run, for one named twice, or for settings that a run refuses.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        candidates: CandidateSource,
        objectives: Sequence[Ascended] = ("contrastive", "margin_i2t", "margin_t2i", "cosine"),
        include: Sequence[Included] = get_args(Included),
        steps: int = 100,
        restarts: int = 2,
        rounds: int = 3,
        beam: int = 4,
        n_queries: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        for what, names, known in (("objectives", objectives, Ascended), ("include", include, Included)):
            if len(set(names)) < len(names) or not set(names) <= set(get_args(known)):
                raise UserError(f"{what} must be some of {', '.join(get_args(known))}, each once, got {list(names)}")
        if not objectives and not include:
            raise UserError("objectives and include are both empty: name at least one run")
        self.runs: dict[str, Attack] = {
            name: Alternating(
                threat=threat,
                candidates=candidates,
                objective=OBJECTIVES[name](),
                steps=steps,
                restarts=restarts,
                rounds=rounds,
                beam=beam,
                seed=seed,
            )
            for name in objectives
        }
        for name in include:
            if name == "square":
                self.runs[name] = Square(
                    threat=threat, objective=Rivals(form="contrastive"), n_queries=n_queries, seed=seed
                )
            else:
                self.runs[name] = ON_WORDS[name](threat=threat, candidates=candidates, seed=seed)
        self._warned: set[str] = set()

    @property
    def passes(self) -> tuple[int, int]:
        """Most image forwards and backwards per image in the runs of `Alternating`."""
        each = [run.passes for run in self.runs.values() if isinstance(run, Alternating)]
        return sum(forwards for forwards, _ in each), sum(backwards for _, backwards in each)

    @property
    def queries(self) -> int:
        """Of Square, per image."""
        return sum(run.n_queries for run in self.runs.values() if isinstance(run, Square))

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        self.check(model, batch, context, draws)
        made: dict[str, Tensor] = {}
        best: Found | None = None
        for name, attack in self.runs.items():
            images, texts = attack.run(model, batch, context, draws)
            made[name] = images
            with torch.no_grad():
                features = model.encode_image(images).features
            found = Found(images, texts, standing(features, text_features(model, texts), batch, context))
            best = found if best is None else merge(found.standing.beats(best.standing), found, best, batch)
        assert best is not None
        if {"contrastive", "square"} <= set(made):
            self._compare(model, batch, context, made)
        return best.images, best.texts

    def check(self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws) -> None:
        """Warn about what a first look at `batch` shows. model: frozen, in eval mode."""
        self._warn(gradient_warnings(model, batch, context, threat=self.threat, draws=draws))

    @torch.no_grad()
    def _compare(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, made: dict[str, Tensor]
    ) -> None:
        value = Rivals(form="contrastive").bind(model, batch, context)
        white, black = (value(model.encode_image(made[name])) for name in ("contrastive", "square"))
        self._warn(black_box_warning(white, black))

    def _warn(self, said: dict[str, str]) -> None:
        for kind, message in said.items():
            if kind not in self._warned:
                self._warned.add(kind)
                warnings.warn(message, UnreliableGradient, stacklevel=1)
