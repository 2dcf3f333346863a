"""The files of a task's evaluation.

results.json: {"task": "grounding", "rows": [TaskRow, ...], "config": {...}, "environment": {...}}
examples.json: [TaskExample, ...] under "examples", with how they were chosen.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from fastmat.evaluation.results import STRICT, Png, Setting


class TaskRow(Setting):
    """A setting and what was measured on it.

    values: the task's figures by name, all times 100; ci: their 95 % intervals. asr: of the rows right when clean, the
    share wrong after the attack, in percent; None when clean, or where rows are not right or wrong. n_rows: pairs, or
    pictures of a captioner; n_images: pictures.
    """

    n_rows: int = Field(ge=1)
    n_images: int = Field(ge=1)
    values: dict[str, float]
    ci: dict[str, tuple[float, float]]
    asr: float | None = Field(default=None, ge=0, le=100)
    max_distance: float = Field(ge=0)
    max_words_changed: int = Field(ge=0)
    seconds: float | None = Field(default=None, ge=0)
    inputs: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")


class TaskResults(BaseModel):
    model_config = STRICT
    task: str
    rows: list[TaskRow]
    config: dict[str, Any]
    environment: dict[str, Any]


class TaskExample(BaseModel):
    """One row before and after an attack.

    clean, adversarial: with the boxes chosen and wanted drawn in, where there are any. difference: 0.5 + magnification
    * (adversarial - clean). said_before, said_after: the model's answers; wanted: the right one.
    """

    model_config = STRICT
    row: str
    setting: Setting
    clean: Png
    adversarial: Png
    difference: Png
    magnification: int = Field(ge=1)
    distance: float = Field(ge=0)
    text_before: str
    text_after: str
    said_before: str
    said_after: str
    wanted: str
    right_before: bool | None
    right_after: bool | None


class TaskExamples(BaseModel):
    model_config = STRICT
    chosen: str
    examples: list[TaskExample]
