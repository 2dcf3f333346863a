"""What the study of test-time defences leaves behind: `results.json`, all rates in percent.

{"study", "dataset", "n_images", "n_captions", "at", "answer": [two sentences], "verdicts": [VERDICT, ...],
 "lines": [LINE, ...], "detectors": [DETECTOR, ...], "config", "environment"}

An ESTIMATE is [value, low, high], a rate with its 95 % interval over images; of a gain, that of paired differences.

LINE: model, guard ("none": the bare model), attack ("none": clean images)
      made      "" (clean), "bare": on the model without the guard, or "guard": through it
      draws     of the guard per image and step while the attack was made
      values    "tr@1" ... "ir@10", and "r@1", "r@5", "r@10", the mean of both ways
VERDICT: of one model and guard, in r@K, K = `at`
      clean, clean_gain, claimed, claimed_gain, adaptive, adaptive_gain: ESTIMATE; gains are over the bare model
      claimed_by, adaptive_by: the attack that left least
DETECTOR: of one model, against one set of attacked images; adaptive: whether they were made with it in mind
      auc, found: ESTIMATE, area under the curve and share above the threshold; false_alarms: of clean images
      curve     [[false alarms, found], ...]
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from fastmat.evaluation.results import STRICT

Estimate = tuple[float, float, float]


class Line(BaseModel):
    model_config = STRICT
    model: str
    guard: str
    attack: str
    made: str
    draws: int
    values: dict[str, Estimate]


class Verdict(BaseModel):
    model_config = STRICT
    model: str
    guard: str
    clean: Estimate
    clean_gain: Estimate
    claimed: Estimate
    claimed_gain: Estimate
    claimed_by: str
    adaptive: Estimate
    adaptive_gain: Estimate
    adaptive_by: str
    verdict: str


class Detection(BaseModel):
    model_config = STRICT
    model: str
    against: str
    adaptive: bool
    auc: Estimate
    found: Estimate
    false_alarms: Estimate
    curve: list[tuple[float, float]]


class TestTimeResults(BaseModel):
    model_config = STRICT
    __test__ = False  # no test, whatever its name
    study: str
    dataset: str
    n_images: int
    n_captions: int
    at: int
    answer: tuple[str, str]
    verdicts: list[Verdict]
    lines: list[Line]
    detectors: list[Detection]
    config: dict[str, Any]
    environment: dict[str, Any]
