"""From answers to rows: what each expert, and the agent, said before and after an attack, in percent with intervals."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from fastmat.evaluation.results import Setting
from fastmat.pipeline.journal import Journal
from fastmat.pipeline.measure import agent_metrics, differ, expert_metrics, fewer
from fastmat.pipeline.results import AGENT, PipelineRow
from fastmat.tasks.base import estimates


@dataclass(frozen=True, kw_only=True)
class Voice:
    """An expert, or the agent, and where its answers stand in the journal: keys before and after the attack, and of the
    clean pictures asked again. rows: the pictures. white_box: attacked through its own weights."""

    label: str
    before: str
    after: str
    again: str | None = None
    rows: tuple[int, ...]
    white_box: bool
    from_gallery: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pipeline (the setting's victim) under an attack, all answers in the journal.

    pictures: sha256 of the attacked ones. origin: whose gradients made them, "" for a model of the pipeline's own; by
    it, cases of several pipelines are the same attack.
    """

    setting: Setting
    pictures: str
    origin: str
    voices: tuple[Voice, ...]

    def same_attack(self, other: Case) -> bool:
        own, others = self.setting, other.setting
        return (own.attack, own.threat, self.origin) == (others.attack, others.threat, other.origin)


def rows_of(
    case: Case,
    reference: Case | None,
    journal: Journal,
    *,
    captions: Sequence[Collection[str]],
    resamples: int,
) -> list[PipelineRow]:
    """A row for each voice. Intervals are bootstrapped over pictures.

    reference: another pipeline under the same attack, which "fewer" compares with; None: there is none.
    captions: per picture, those that are right.
    """
    rivals = {voice.label: voice for voice in reference.voices} if reference else {}
    return [
        _row(case, voice, rivals.get(voice.label), journal, captions=captions, resamples=resamples)
        for voice in case.voices
    ]


def _row(
    case: Case,
    voice: Voice,
    rival: Voice | None,
    journal: Journal,
    *,
    captions: Sequence[Collection[str]],
    resamples: int,
) -> PipelineRow:
    def told(key: str) -> list[str | None]:
        return [entry.answer for entry in journal.answers(key, voice.rows)]

    before, after = told(voice.before), told(voice.after)
    if voice.label == AGENT:
        metrics = agent_metrics(before, after, None if voice.again is None else told(voice.again))
    else:
        right = [captions[row] for row in voice.rows] if voice.from_gallery else None
        metrics = expert_metrics(before, after, right)
    if rival is not None:
        metrics["fewer"] = fewer(differ(told(rival.before), told(rival.after)), differ(before, after))
    values, intervals = estimates(metrics, torch.arange(len(voice.rows)), seed=case.setting.seed, resamples=resamples)
    return PipelineRow(
        **{**case.setting.model_dump(), "white_box": voice.white_box},
        origin=case.origin,
        expert=voice.label,
        n_images=len(voice.rows),
        values=values,
        ci=intervals,
        max_distance=max(entry.distance for entry in journal.answers(voice.after, voice.rows)),
    )
