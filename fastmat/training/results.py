"""What a training run says of itself, line by line: `log.jsonl`, read back. Nothing else passes from it to a report."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fastmat.errors import UserError

PLAIN = ConfigDict(extra="ignore", frozen=True)


class LoggedStep(BaseModel):
    """A step; null is what was not finite. seconds: since this part of the run began; taken: since the line before."""

    model_config = PLAIN
    step: int
    loss: float | None
    terms: dict[str, float | None]
    grad_norm: float | None
    lr: float
    skipped: int
    seconds: float
    pairs_per_s: float
    taken: dict[str, float] = {}


class Rates(BaseModel):
    """Recall@1 in percent, of images that ask for captions (tr) and of captions that ask for images (ir)."""

    model_config = PLAIN
    tr: float
    ir: float


class Validation(BaseModel):
    """metric: what `score` is, in words; the checkpoint with the largest one is the best.

    clean, robust: before and after the attack. seconds: that it took.
    """

    model_config = PLAIN
    metric: str
    score: float
    clean: Rates
    robust: Rates
    seconds: float


class Validated(BaseModel):
    """A checkpoint, judged. best: none before it scored as much."""

    model_config = PLAIN
    step: int
    validation: Validation
    best: bool


class TrainingLog(BaseModel):
    """The lines of both kinds, in order."""

    model_config = PLAIN
    steps: list[LoggedStep]
    validated: list[Validated]

    def best(self, metric: str | None = None) -> Validated | None:
        """The checkpoint that scored highest, the first of equals; metric: among those judged by it, None: by the
        last one's."""
        metric = metric or (self.validated[-1].validation.metric if self.validated else None)
        alike = [line for line in self.validated if line.validation.metric == metric]
        return max(alike, key=lambda line: line.validation.score, default=None)


def read_log(path: Path) -> TrainingLog:
    """The lines of a `log.jsonl`; a last line that was cut short counts as never written.

    Raises UserError, naming file and line, for anything else.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name the folder of a training run") from None
    steps: list[LoggedStep] = []
    validated: list[Validated] = []
    for number, line in enumerate(lines, start=1):
        try:
            if b'"validation"' in line:
                validated.append(Validated.model_validate_json(line))
            else:
                steps.append(LoggedStep.model_validate_json(line))
        except ValidationError as error:
            if number == len(lines):
                break
            first = error.errors()[0]
            raise UserError(f"{path}, line {number}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return TrainingLog(steps=steps, validated=validated)
