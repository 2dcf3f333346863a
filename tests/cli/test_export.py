"""`export`: 8-bit pictures that stay within the budget, counted in whole levels, and can be evaluated as a data set."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastmat.evaluation.export import to_8bit, within_l2
from fastmat.evaluation.results import Threat, read_results

Fastmat = Callable[..., tuple[int, str, str]]


def levels(path: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).astype(np.int64))


@pytest.mark.parametrize(
    ("threat", "says"),
    [
        ("{eps: 2/255}", "at most 2/255 from the clean ones (budget 2/255, linf)"),
        ("{eps: 2.5/255}", "at most 2/255 from the clean ones (budget 2.5/255, linf)"),
        ("{eps: 0.5/255}", "the budget 0.5/255 is less than one 8-bit level: no pixel can move"),
        ("{eps: 0.3, norm: l2}", "from the clean ones (budget 0.3, l2)"),
    ],
)
def test_exported_pictures_are_within_the_budget(
    fastmat: Fastmat, settings: list[str], pictures: Path, tmp_path: Path, threat: str, says: str
) -> None:
    stored, out = tmp_path / "set", tmp_path / "png"
    words = ["model=tiny", "attack={name: sga, steps: 2, scales: [0.5]}", f"threat={threat}"]
    assert fastmat("attack", *settings, *words, "--out", stored)[0] == 0
    code, shown, error = fastmat("export", stored, "--out", out)
    assert code == 0, error
    assert says in shown
    told = json.loads((out / "manifest.json").read_text())
    eps, norm = told["threat"]["eps"], told["threat"]["norm"]
    rows = json.loads((out / "annotations.json").read_text())
    moved = 0
    for i, (row, image) in enumerate(zip(rows, told["images"], strict=True)):
        assert row["image_id"] == image["image"] == f"images/{i}.png"
        delta = levels(out / row["image"]) - levels(pictures / f"images/{i}.png")
        if norm == "linf":
            assert int(delta.abs().max()) <= int(eps * 255 + 1e-9)
            assert image["distance_8bit"] == pytest.approx(int(delta.abs().max()) / 255)
        else:
            assert int((delta**2).sum()) <= (eps * 255) ** 2
            assert image["distance_8bit"] == pytest.approx(int((delta**2).sum()) ** 0.5 / 255)
        assert image["moved"] <= told["moved_max"]
        moved += int((delta != 0).sum())
    assert (moved > 0) == (eps * 255 >= 1)
    lines = [json.loads(line) for line in (stored / "texts.jsonl").read_text().splitlines()]
    assert [text for row in rows for text in row["caption"]] == [line["adversarial"] for line in lines]

    data = {"name": "json", "title": "png", "split": "test", "images": str(out)}
    data["annotations"] = str(out / "annotations.json")
    words = [f"data={json.dumps(data)}", "victims.tiny.model=tiny", "resamples=10"]
    assert fastmat("eval", *words, "--out", tmp_path / "eval")[0] == 0
    assert read_results(tmp_path / "eval").rows[0].n_captions == 12


def test_a_set_of_some_images_is_exported_and_another_is_told_apart(
    fastmat: Fastmat, settings: list[str], pictures: Path, tmp_path: Path
) -> None:
    words = ["victims.v.model=tiny", "attacks.pgd={name: pgd, steps: 1}", "subset.pgd=2", "keep_sets=true"]
    assert fastmat("eval", *settings, *words, "resamples=10", "--out", tmp_path / "eval")[0] == 0
    (stored,) = (tmp_path / "eval" / "sets" / "v").iterdir()
    assert fastmat("export", stored, "--out", tmp_path / "png")[0] == 0
    assert len(list((tmp_path / "png" / "images").iterdir())) == 2
    code, _, error = fastmat("export", stored, "--out", tmp_path / "other", "rows=[0, 0]")
    assert code == 2
    assert "data: six/test is not what" in error
    assert not (tmp_path / "other").exists()


def test_the_nearest_level_that_is_allowed() -> None:
    clean = torch.tensor([10, 10, 0, 255, 100, 100], dtype=torch.uint8).view(1, 3, 1, 2)
    exact = torch.tensor([11.4, 11.6, 1.2, 253.9, 98.6, 97.5])
    made = to_8bit(exact.view(1, 3, 1, 2) / 255, clean, threat=Threat(eps=2 / 255))
    assert made.flatten().tolist() == [11, 12, 1, 254, 99, 98]


def test_l2_gives_up_the_least_precision() -> None:
    delta = torch.tensor([0.9, -0.6, 0.5001, 3.0, 0.0], dtype=torch.float64)
    whole = within_l2(delta, most=100)
    assert whole.tolist() == [1, -1, 1, 3, 0]
    assert within_l2(delta, most=11).tolist() == [1, -1, 0, 3, 0]  # the one that was nearest to rounding down
    assert within_l2(delta, most=10).tolist() == [1, 0, 0, 3, 0]
    assert within_l2(delta, most=0).tolist() == [0] * 5
    generator = torch.Generator().manual_seed(0)
    for most in (0, 1, 50, 5000):
        delta = torch.randn(500, dtype=torch.float64, generator=generator) * 3
        assert int((within_l2(delta, most) ** 2).sum()) <= most
