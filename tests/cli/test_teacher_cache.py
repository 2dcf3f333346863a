"""The teacher's embeddings of a set, kept on disk: the same numbers, computed once."""

import shutil
from pathlib import Path

import pytest
import torch
from cli.conftest import Fastmat
from safetensors.torch import load_file

from fastmat.attacks.draws import SeededDraws
from fastmat.data.digits import digits_set
from fastmat.data.loader import TrainingBatches
from fastmat.defences.fare import FARE
from fastmat.defences.teacher import Teacher
from fastmat.defences.teacher_cache import TeacherCache
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.types import ThreatModel

DIGITS = digits_set("val").take(24)
RUN = [
    "data={name: digits, split: val}",
    "model=tiny",
    "limit=24",
    "batch_size=8",
    "defence={name: fare, steps: 1}",
]


def batches(transform) -> TrainingBatches:
    return TrainingBatches(DIGITS, transform, batch_size=8, seed=3)


def counting(model, seen: list[int]):
    """`model` that notes how many images it is asked to encode."""
    encode = model.encode_image
    model.encode_image = lambda images: (seen.append(len(images)), encode(images))[1]
    return model


def test_rows_are_what_the_teacher_says_of_each_image(tmp_path: Path) -> None:
    model = tiny_clip().eval()
    cache = TeacherCache(tmp_path / "cache", DIGITS, model.image_transform)
    kept, plain = Teacher(model, cache), Teacher(model)
    seen: list[int] = []
    counting(kept.model, seen)
    for step in range(6):  # two epochs
        batch = batches(model.image_transform).batch(step)
        torch.testing.assert_close(kept.clean_embeds(batch), plain.images(batch.images).embeds, rtol=1e-5, atol=1e-6)
    assert sum(seen) == 24  # each image once, not once per epoch
    again: list[int] = []
    other = Teacher(model, TeacherCache(tmp_path / "cache", DIGITS, model.image_transform))
    counting(other.model, again)
    batch = batches(model.image_transform).batch(0)
    assert torch.equal(other.clean_embeds(batch), kept.clean_embeds(batch)) and not again
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_another_teacher_or_another_size_is_another_file(tmp_path: Path) -> None:
    model = tiny_clip().eval()
    TeacherCache(tmp_path, DIGITS, model.image_transform).embeds(model)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    TeacherCache(tmp_path, DIGITS, model.image_transform).embeds(model)
    TeacherCache(tmp_path, DIGITS.take(20), model.image_transform).embeds(model)
    assert len(list(tmp_path.iterdir())) == 3


def test_fare_takes_the_same_step(tmp_path: Path) -> None:
    model = tiny_clip().eval()
    threat = ThreatModel(eps=8 / 255)
    batch = batches(model.image_transform).batch(0)
    cache = TeacherCache(tmp_path, DIGITS, model.image_transform)
    views = [
        FARE(threat=threat, teacher=model, steps=2, teacher_cache=known).perturb(model, batch, SeededDraws(0))
        for known in (None, cache)
    ]
    (plain, plain_target), (kept, kept_target) = ((of.images["adv"], *of.targets.values()) for of in views)
    torch.testing.assert_close(kept_target, plain_target, rtol=1e-5, atol=1e-6)
    assert float((kept - plain).abs().max()) <= 2 * threat.eps
    assert float((kept != plain).float().mean()) < 0.01  # the sign of a gradient at zero may turn


def test_a_run_that_goes_on_reads_what_it_read_before(fastmat: Fastmat, tmp_path: Path) -> None:
    """Two epochs, gone on with inside the second: the same bits as without a stop."""
    words = [*RUN, f"teacher_cache={tmp_path / 'cache'}", "train={steps: 6, lr: 0.01, save_every: 2, keep_last: 3}"]
    code, _, error = fastmat("train", *words, "--out", tmp_path / "run")
    assert code == 0, error
    weights = tmp_path / "run" / "model.safetensors"
    whole = load_file(weights)
    weights.unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    code, _, error = fastmat("train", *words, "--out", tmp_path / "run", "--resume")
    assert code == 0, error
    resumed = load_file(weights)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["augment={views: 1}"], "set augment.views to 0"),
        (["defence=finetune"], "finetune compares nothing with a teacher's embeddings"),
        (["defence={name: mat, text_search: embedding_space}"], "this MAT has none"),
    ],
)
def test_where_it_would_be_of_no_use_it_is_refused(
    fastmat: Fastmat, tmp_path: Path, settings: list[str], sentence: str
) -> None:
    more = [*settings, "train={steps: 1, lr: 0.01}", f"teacher_cache={tmp_path / 'cache'}"]
    code, _, error = fastmat("train", *RUN, *more, "--out", tmp_path / "run")
    assert code == 2 and sentence in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_bad_folders_and_files(tmp_path: Path) -> None:
    model = tiny_clip().eval()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give another folder"):
        TeacherCache(tmp_path / "file", DIGITS, model.image_transform).embeds(model)
    cache = TeacherCache(tmp_path / "cache", DIGITS, model.image_transform)
    cache.embeds(model)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        cache.embeds(model)
