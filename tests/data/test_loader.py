import multiprocessing
from dataclasses import replace

import pytest
import torch
from PIL import Image

from fastmat.data.loader import TrainingBatches, evaluation_batches
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError
from fastmat.types import Batch, ImageTransform

TRANSFORM = ImageTransform(size=4)


class Pictures:
    """Row i is of the grey i; `bad` raises what a damaged file raises."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad

    def __call__(self, row: int) -> Image.Image:
        if row == self.bad:
            raise UserError(f"set.json, row {row + 1}: x.png: cannot be decoded")
        return Image.new("RGB", (5, 5), (row, row, row))


def ragged(n: int = 11, bad: int | None = None) -> RetrievalSet:
    return RetrievalSet(
        name="tiny",
        split="train",
        captions=tuple(tuple(f"{i}/{j}" for j in range(1 + i % 7)) for i in range(n)),
        ids=tuple(map(str, range(n))),
        group=tuple(i // 2 for i in range(n)),
        load=Pictures(bad),
    )


def training(workers: int = 0, seed: int = 5, **changes: int) -> TrainingBatches:
    settings = {"batch_size": 4, "captions_per_image": 2} | changes
    return TrainingBatches(ragged(), TRANSFORM, seed=seed, workers=workers, **settings)


def same(a: Batch, b: Batch) -> bool:
    tensors = all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("images", "txt2img", "index", "group"))
    return tensors and a.texts == b.texts


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_every_image_and_caption_in_order(workers: int) -> None:
    batches = evaluation_batches(ragged(), TRANSFORM, batch_size=4, workers=workers)
    seen = list(batches)
    assert len(batches) == 3
    assert [len(b) for b in seen] == [4, 4, 3]
    assert torch.cat([b.index for b in seen]).tolist() == list(range(11))
    assert torch.cat([b.group for b in seen]).tolist() == [i // 2 for i in range(11)]
    for batch in seen:
        assert batch.images.dtype == torch.float32
        assert torch.equal(batch.images[:, 0, 0, 0], batch.index / 255)
        owners = batch.index[batch.txt2img].tolist()
        assert [int(text.split("/")[0]) for text in batch.texts] == owners == sorted(owners)
    assert tuple(t for b in seen for t in b.texts) == tuple(t for own in ragged().captions for t in own)
    assert all(same(a, b) for a, b in zip(seen, batches, strict=True))  # a second pass


def test_training_is_a_function_of_seed_and_step() -> None:
    assert same(training().batch(7), training().batch(7))
    assert not same(training().batch(7), training().batch(8))
    assert not same(training().batch(7), training(seed=6).batch(7))


@pytest.mark.parametrize("workers", [0, 2])
def test_iterate_equals_batch_across_epochs(workers: int) -> None:
    expected = [training().batch(step) for step in range(1, 8)]
    found = list(training(workers).iterate(1, 8))
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))


class Counted(Pictures):
    """Remembers what was decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __call__(self, row: int) -> Image.Image:
        self.seen.append(row)
        return super().__call__(row)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_shares_of_all_processes_are_the_whole_batch(workers: int) -> None:
    shares = [list(training(workers).iterate(1, 8, rank=rank, world=2)) for rank in (0, 1)]
    for i, step in enumerate(range(1, 8)):
        whole = training().batch(step)
        assert all(same(shares[rank][i], whole.rows(2 * rank, 2 * rank + 2)) for rank in (0, 1))


def test_a_process_decodes_its_share_only() -> None:
    counted = Counted()
    batches = TrainingBatches(replace(ragged(), load=counted), TRANSFORM, batch_size=4, seed=5)
    shares = list(batches.iterate(0, 3, rank=1, world=2))
    assert counted.seen == torch.cat([share.index for share in shares]).tolist() and len(counted.seen) == 6


def test_a_batch_that_cannot_be_divided_is_refused_before_the_first_one() -> None:
    with pytest.raises(UserError, match="batch of 4 images cannot be divided among 3 processes; set batch_size"):
        training().iterate(0, 1, rank=0, world=3)


def test_an_epoch_holds_no_image_twice_and_the_next_is_another() -> None:
    batches = training(batch_size=5)
    assert batches.steps_per_epoch == 2
    epochs = [torch.cat([batches.batch(s).index for s in (e, e + 1)]).tolist() for e in (0, 2, 4)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_captions_are_drawn_without_replacement() -> None:
    batches = training(batch_size=11, captions_per_image=3)
    seen: dict[int, set[str]] = {}
    for step in range(60):
        batch = batches.batch(step)
        for place, row in enumerate(batch.index.tolist()):
            own = [t for t, image in zip(batch.texts, batch.txt2img.tolist(), strict=True) if image == place]
            assert len(own) == len(set(own)) == min(3, 1 + row % 7)
            assert set(own) <= set(ragged().captions[row])
            seen.setdefault(row, set()).update(own)
    assert all(seen[row] == set(ragged().captions[row]) for row in range(11))  # every caption has its turn


def test_the_global_random_stream_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(evaluation_batches(ragged(), TRANSFORM, batch_size=4))
    list(training(workers=1).iterate(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_error_is_the_sentence_itself(workers: int) -> None:
    bad = ragged(bad=6)
    with pytest.raises(UserError, match=r"^set\.json, row 7: x\.png: cannot be decoded$"):
        list(evaluation_batches(bad, TRANSFORM, batch_size=2, workers=workers))
    with pytest.raises(UserError, match=r"^set\.json, row 7: x\.png: cannot be decoded$"):
        list(TrainingBatches(bad, TRANSFORM, batch_size=11, seed=0, workers=workers).iterate(0, 1))


def test_stopping_early_leaves_no_process_behind() -> None:
    before = len(multiprocessing.active_children())
    stream = training(workers=2).iterate(0, 100)
    next(stream)
    assert len(multiprocessing.active_children()) == before + 2
    stream.close()
    assert len(multiprocessing.active_children()) == before


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="batch_size 12 is more than the 11 images of tiny/train"):
        training(batch_size=12)
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        training(batch_size=0)
    with pytest.raises(UserError, match="captions_per_image must be at least 1"):
        training(captions_per_image=0)
    with pytest.raises(UserError, match="workers must not be negative"):
        evaluation_batches(ragged(), TRANSFORM, batch_size=1, workers=-1)
    with pytest.raises(UserError, match="seed must not be negative"):
        training(seed=-1)


def test_each_step_draws_its_own_captions() -> None:
    one = replace(ragged(1), captions=(("a", "b", "c", "d", "e"),))
    batches = TrainingBatches(one, TRANSFORM, batch_size=1, seed=0)
    assert len({batches.batch(step).texts for step in range(40)}) == 5
