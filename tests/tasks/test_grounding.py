"""Grounding against RefCOCO's published evaluation, written out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from annotated import write_refcoco

from fastmat.data.loader import evaluation_batches
from fastmat.models.tiny_fusion import tiny_albef
from fastmat.tasks.base import Judged, estimates
from fastmat.tasks.gradcam import attention_maps
from fastmat.tasks.grounding import Grounding, box_scores, overlap


def published_iou(a: list[float], b: list[float]) -> float:
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right, bottom = min(a[0] + a[2] - 1, b[0] + b[2] - 1), min(a[1] + a[3] - 1, b[1] + b[3] - 1)
    common = (right - left + 1) * (bottom - top + 1) if left < right and top < bottom else 0
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def published_scores(heat: torch.Tensor, boxes: list[list[float]], size: tuple[int, int]) -> list[float]:
    grown = F.interpolate(heat[None, None], size=size, mode="bicubic").squeeze()
    return [float(grown[int(y) : int(y + h), int(x) : int(x + w)].sum() / (w * h) ** 0.5) for x, y, w, h in boxes]


def random_boxes(count: int, *, seed: int) -> torch.Tensor:
    """In a picture of height 30 and width 50, some beyond its edge."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([40.0, 20.0])
    return torch.cat((corner, 1 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 20), 1)


def test_overlap_of_boxes() -> None:
    a, b = random_boxes(300, seed=0), random_boxes(300, seed=1)
    b[:50] = a[:50] + 0.3
    found = [published_iou(*pair) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    assert 0 in found and max(found) > 0.8
    torch.testing.assert_close(overlap(a, b), torch.tensor(found, dtype=torch.float64))


def test_scores_of_boxes() -> None:
    heat, boxes = torch.rand(4, 4, generator=torch.Generator().manual_seed(2)), random_boxes(40, seed=3)
    found = box_scores(heat, boxes, (30, 50))
    expected = torch.tensor(published_scores(heat, boxes.tolist(), (30, 50)), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def judged(tmp_path: Path) -> tuple[Grounding, Judged, list[bool], list[str]]:
    """A task, what a model says, and what the published evaluation says of the same maps, expression by expression."""
    arguments = write_refcoco(tmp_path)
    paths = {key: Path(value) for key, value in arguments.items() if key != "annotations"}
    task = Grounding(annotations=tuple(map(Path, arguments["annotations"])), **paths, layer=1)
    model = tiny_albef()
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    batches = evaluation_batches(task.data, model.image_transform, batch_size=5)
    right, parts = [], []
    for batch in batches:
        for row, heat in zip(batch.index.tolist(), attention_maps(model, batch, layer=1), strict=True):
            boxes = task.set.boxes[row].tolist()
            scores = published_scores(heat, boxes, task.set.size[row])
            chosen = boxes[scores.index(max(scores))]
            right.append(published_iou(chosen, task.set.target[row].tolist()) >= 0.5)
            parts.append(task.set.part[row])
    return task, task.judge(model, batches), right, parts


def test_accuracy_by_part(judged: tuple[Grounding, Judged, list[bool], list[str]]) -> None:
    task, found, right, parts = judged
    assert found.right is not None and found.right.tolist() == right
    assert 0 < sum(right) < len(right)
    values, intervals = estimates(found.metrics, task.picture, seed=0, resamples=50)
    assert list(values) == ["val", "testA", "testB"]
    for part, value in values.items():
        own = [hit for hit, other in zip(right, parts, strict=True) if other == part]
        assert value == pytest.approx(100 * sum(own) / len(own))
        assert intervals[part][0] <= value <= intervals[part][1]
    assert all(0 <= x <= 1 and 0 <= y <= 1 for x, y, *_ in found.boxes)


def test_without_a_box_the_answer_is_wrong(judged: tuple[Grounding, Judged, list[bool], list[str]]) -> None:
    task, found, right, _ = judged
    row = right.index(True)
    task.set = replace(task.set, boxes=tuple(b[:0] if i == row else b for i, b in enumerate(task.set.boxes)))
    again = task.judge(tiny_albef(), evaluation_batches(task.data, tiny_albef().image_transform, batch_size=5))
    assert again.right is not None and not again.right[row] and again.boxes[row] == (0.0,) * 4
    assert found.boxes[row] != (0.0,) * 4
