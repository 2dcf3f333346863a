"""The files of a pipeline under attack.

answers.jsonl   one `Entry` a line: every answer as it came, of experts and of the agent
results.json    `PipelineResults`
examples.json   `PipelineExamples`
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from fastmat.evaluation.results import STRICT, Png, Setting

AGENT = "agent"


class CallEntry(BaseModel):
    """A tool call of the agent. argument: as the model wrote it. failed: it was told what is wrong with it."""

    model_config = STRICT
    tool: str
    argument: str
    answer: str
    failed: bool = False


class Entry(BaseModel):
    """What one expert, or the agent, said of one picture.

    key: sha256 of all that the answer depends on besides the row. row, image: position and name of the picture.
    asked, of: who and about what, for readers. argument: what an expert was told beside the picture.
    distance: from the clean picture. answer: None where the agent gave none. calls: of the agent, in order.
    """

    model_config = STRICT
    key: str = Field(pattern="^[0-9a-f]{64}$")
    row: int = Field(ge=0)
    image: str
    asked: str
    of: str
    argument: str = ""
    answer: str | None
    distance: float = Field(default=0.0, ge=0)
    calls: list[CallEntry] = []


class PipelineRow(Setting):
    """One expert of one pipeline (the setting's victim), or its agent, under one attack.

    values: percentages by name (`fastmat.pipeline.measure`), "fewer" in percentage points against the first pipeline;
    ci: their 95 % intervals. For the agent, white_box says that one of its experts is attacked through its own weights.
    origin: whose gradients were used, "" for a model of the pipeline's own; rows that share it are compared.
    """

    expert: str
    origin: str
    n_images: int = Field(ge=1)
    values: dict[str, float]
    ci: dict[str, tuple[float, float]]
    max_distance: float = Field(ge=0)


class PipelineResults(BaseModel):
    """question: what the agent is asked; None without one."""

    model_config = STRICT
    question: str | None
    rows: list[PipelineRow]
    config: dict[str, Any]
    environment: dict[str, Any]


class Said(BaseModel):
    """An expert's answers to one picture before and after, and what it was told beside it."""

    model_config = STRICT
    expert: str
    argument: str
    before: str | None
    after: str | None
    changed: bool


class PipelineExample(BaseModel):
    """One picture before and after an attack, and what a pipeline said of it.

    pictures: sha256 of the attacked set. difference: 0.5 + magnification * (adversarial - clean).
    """

    model_config = STRICT
    image: str
    pictures: str
    setting: Setting
    clean: Png
    adversarial: Png
    difference: Png
    magnification: int = Field(ge=1)
    distance: float = Field(ge=0)
    said: list[Said]


class PipelineExamples(BaseModel):
    model_config = STRICT
    chosen: str
    examples: list[PipelineExample]
