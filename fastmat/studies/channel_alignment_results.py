"""What the study of channel-wise correction leaves behind: `results.json`, rates in percent with 95 % intervals.

{"study", "answer": [sentence, sentence], "dataset", "n_images", "n_captions", "calibration", "misalignment": [LAYER],
 "removed": [REMOVED], "rows": [ROW], "versus": [VERSUS], "chosen": {model: the static correction with the least loss
 on the calibration pairs}, "dynamic": its label, "config", "environment"}

LAYER: model, encoder ("image", "text"), layer, attack, and the measures of `fastmat.alignment.misalignment`, of the
       first seed; by_channel only at the projections. null: a measure that has no value there.
ROW:   model, correction, attack, made_on ("": clean; uncorrected: not adaptive; corrected: adaptive; other: transfer)
       n_images  queries; values  metric: [value, low, high]; change  the same minus that of the model without a
       correction under the same attack, on the same images; attack "worst": each query's worst rank over the
       attacks that every correction met on every image, whatever they were made on; "all": over all attacks, on the
       images that every one attacked.
       metrics: tr@1 ... ir@10; r@1 and r@10, the mean over images of both ways; mean, of these two.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from fastmat.evaluation.results import STRICT

Estimate = tuple[float, float, float]


class Layer(BaseModel):
    model_config = STRICT
    model: str
    encoder: str
    layer: str
    attack: str
    channels: int
    explained_by_shift: Estimate | None
    explained_by_affine: float | None
    mean_shift: float | None
    wasserstein: float | None
    uniformity_clean: float | None
    uniformity_adversarial: float | None
    rank_correlation: float | None
    by_channel: list[float | None]


class Removed(BaseModel):
    """What a correction does to features of the first seed's test pairs. removed: the share of sum |z' - z|^2 that is
    gone; below 0: it added to it. clean_moved: |correction(z) - z|^2 over |z|^2 of clean features. In percent."""

    model_config = STRICT
    model: str
    correction: str
    attack: str
    site: str
    removed: Estimate | None
    clean_moved: Estimate | None


class Row(BaseModel):
    model_config = STRICT
    model: str
    correction: str
    attack: str
    made_on: str
    n_images: int
    values: dict[str, Estimate | None]
    change: dict[str, Estimate | None]


class Versus(BaseModel):
    """The dynamic correction minus another one, on the same images under the same attack."""

    model_config = STRICT
    model: str
    dynamic: str
    other: str
    attack: str
    made_on: str
    values: dict[str, Estimate | None]


class Calibration(BaseModel):
    """losses: model to correction to |z^(x') - z(x)|^2 + |z^(x) - z(x)|^2 over |z|^2 on the calibration pairs, the mean
    over sites and seeds; "none": without a correction."""

    model_config = STRICT
    dataset: str
    n_images: int
    losses: dict[str, dict[str, float]]


class AlignmentResults(BaseModel):
    model_config = STRICT
    study: str
    answer: list[str]
    dataset: str
    n_images: int
    n_captions: int
    seeds: int
    calibration: Calibration
    chosen: dict[str, str]
    dynamic: str | None
    misalignment: list[Layer]
    removed: list[Removed]
    rows: list[Row]
    versus: list[Versus]
    config: dict[str, Any]
    environment: dict[str, Any]
