"""A task's rows: a model's answers, clean or attacked, as figures with intervals, and a few of them to look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import ImageDraw
from PIL.Image import fromarray
from torch import Tensor

from fastmat.errors import UserError
from fastmat.evaluation.evaluate import Attacked, Measured
from fastmat.evaluation.examples import magnified, png, to_uint8
from fastmat.evaluation.metrics import attack_success_rate
from fastmat.evaluation.results import Setting
from fastmat.models.protocol import VisionLanguageModel
from fastmat.tasks.base import Judged, Task, estimates, share
from fastmat.tasks.results import TaskExample, TaskRow
from fastmat.types import Batch

CHOSEN, WANTED = (217, 145, 61), (90, 158, 128)  # frames: what the model chose, what is right


@dataclass(kw_only=True)
class Seen:
    """Pictures [3, H, W] and texts of the rows to `keep`, as they pass by."""

    keep: frozenset[int]
    pictures: dict[int, Tensor] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    distance: dict[int, float] = field(default_factory=dict)

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            owner = batch.txt2img.tolist()
            for place, row in enumerate(batch.index.tolist()):
                if row in self.keep:
                    self.pictures[row] = batch.images[place].cpu()
                    self.texts[row] = batch.texts[owner.index(place)]
            yield batch

    def watch_attacked(self, attacked: Iterable[Attacked]) -> Iterator[Attacked]:
        for part in attacked:
            self.distance |= dict(zip(part.pairs.index.tolist(), part.distance.tolist(), strict=True))
            yield part


def judge_attacked(
    task: Task, victim: VisionLanguageModel, attacked: Iterable[Attacked], *, clean: Judged, seen: Seen
) -> tuple[Judged, Measured]:
    """The answers to attacked rows, and what passed by. Raises UserError unless the rows are those of `clean`."""
    measured = Measured()
    judged = task.judge(victim, seen.watch(measured.watch(seen.watch_attacked(attacked))))
    if len(judged.said) != len(clean.said):
        raise UserError(f"{len(judged.said)} rows were attacked, {len(clean.said)} are judged: not the same data")
    return judged, measured


def task_row(
    task: Task,
    judged: Judged,
    *,
    setting: Setting,
    resamples: int,
    inputs: str,
    clean: Judged | None = None,
    measured: Measured | None = None,
) -> TaskRow:
    """clean: the same model's answers before the attack; measured: of the attack; both None for the clean row."""
    picture = task.picture[: len(judged.said)]
    metrics, asr = dict(judged.metrics), None
    if clean is not None and clean.right is not None and judged.right is not None:
        asr = attack_success_rate((~clean.right).long(), (~judged.right).long(), 1)
        metrics["asr"] = share(clean.right & ~judged.right, clean.right)
    values, intervals = estimates(metrics, picture, seed=setting.seed, resamples=resamples)
    values.pop("asr", None)
    return TaskRow(
        **setting.model_dump(),
        n_rows=len(judged.said),
        n_images=len(picture.unique()),
        values=values,
        ci=intervals,
        asr=asr,
        max_distance=measured.distance if measured else 0.0,
        max_words_changed=measured.words if measured else 0,
        seconds=measured.seconds if measured else None,
        inputs=inputs,
    )


def pick_rows(judged: Judged, *, count: int, seed: int) -> list[int]:
    """Up to `count` rows, drawn among those that are right when clean, then among others."""
    order = torch.randperm(len(judged.said), generator=torch.Generator().manual_seed(seed))
    if judged.right is not None:
        order = order[(~judged.right[order]).int().argsort(stable=True)]
    return order[:count].tolist()


def make_examples(
    task: Task, rows: Sequence[int], *, setting: Setting, before: tuple[Seen, Judged], after: tuple[Seen, Judged]
) -> list[TaskExample]:
    """before, after: what was seen of the rows, and the model's answers."""
    (clean, said), (attacked, told) = before, after
    made = []
    for row in rows:
        difference, magnification = magnified(clean.pictures[row], attacked.pictures[row])
        made.append(
            TaskExample(
                row=task.data.ids[row],
                setting=setting,
                clean=framed(clean.pictures[row], task, said, row),
                adversarial=framed(attacked.pictures[row], task, told, row),
                difference=png(difference),
                magnification=magnification,
                distance=attacked.distance[row],
                text_before=clean.texts[row],
                text_after=attacked.texts[row],
                said_before=said.said[row],
                said_after=told.said[row],
                wanted=task.wanted[row],
                right_before=None if said.right is None else bool(said.right[row]),
                right_after=None if told.right is None else bool(told.right[row]),
            )
        )
    return made


def framed(picture: Tensor, task: Task, judged: Judged, row: int) -> str:
    """A picture as base64 PNG, with the box wanted and the box chosen where the task has boxes."""
    if not judged.boxes:
        return png(picture)
    image = fromarray(to_uint8(picture).permute(1, 2, 0).contiguous().numpy())
    draw = ImageDraw.Draw(image)
    height, width = picture.shape[-2:]
    for box, colour in ((task.wanted_boxes[row], WANTED), (judged.boxes[row], CHOSEN)):
        x, y, w, h = box
        corners = (x * width, y * height, max(x, x + w) * width - 1, max(y, y + h) * height - 1)
        left, top, right, bottom = corners
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=max(1, width // 128))
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
    return png(data)
