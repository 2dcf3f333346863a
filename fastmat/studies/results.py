"""What a study leaves behind: `results.json`, all rates in percent, each with its 95 % interval.

{"study", "dataset", "n_images", "n_captions", "lines": [LINE, ...], "config", "environment"}

LINE: part, defence, weight, attack ("none": clean), scoring
      values    metric: [value, low, high], the mean over the seeds; null: a rate of no queries
      by_seed   of each seed, the value of some metrics
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from fastmat.evaluation.results import STRICT


class Line(BaseModel):
    model_config = STRICT
    part: str
    defence: str
    weight: str
    attack: str
    scoring: str
    values: dict[str, tuple[float, float, float] | None]
    by_seed: list[dict[str, float]]


class StudyResults(BaseModel):
    model_config = STRICT
    study: str
    dataset: str
    n_images: int
    n_captions: int
    lines: list[Line]
    config: dict[str, Any]
    environment: dict[str, Any]
