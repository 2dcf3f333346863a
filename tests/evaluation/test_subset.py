import dataclasses
from collections.abc import Callable

import pytest
import torch
from PIL import Image

from fastmat.attacks.pgd import PGD
from fastmat.data.loader import evaluation_batches
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError
from fastmat.evaluation.evaluate import Attacked, encode_gallery, gallery_context, gallery_ranks, run_attack
from fastmat.evaluation.metrics import attack_success_rate, recall_at
from fastmat.evaluation.results import Setting
from fastmat.evaluation.subset import draw_rows, evaluate_subset, pick, picked
from fastmat.models.dual_encoder import DualEncoder
from fastmat.types import Batch, ImageTransform

Split = Callable[[int], list[Batch]]
SETTING = Setting(surrogate="a", victim="b", defence="none", attack="pgd", dataset="d", split="test", seed=3)
ROWS = (0, 4, 7, 10)  # 0 and 7 show the same


def some_attacked(model: DualEncoder, pgd: PGD, batches: list[Batch]) -> list[Attacked]:
    context = gallery_context(encode_gallery(model, batches))
    return list(run_attack(model, pgd, [batches[row] for row in ROWS], context))


def test_only_the_chosen_queries_are_judged_among_everything(model: DualEncoder, split: Split, pgd: PGD) -> None:
    batches = split(1)
    attacked = some_attacked(model, pgd, batches)
    clean = encode_gallery(model, batches)
    row = evaluate_subset(model, attacked, clean=clean, rows=ROWS, setting=SETTING, resamples=20)

    mixed = list(batches)  # the same by hand: the whole gallery, encoded anew
    for place, part in zip(ROWS, attacked, strict=True):
        mixed[place] = part.pairs
    before, after = gallery_ranks(clean), gallery_ranks(encode_gallery(model, mixed))
    captions = torch.isin(before.txt2img, torch.tensor(ROWS))
    for k in (1, 5, 10):
        assert row.value(f"tr@{k}") == recall_at(after.tr[list(ROWS)], k)
        assert row.value(f"ir@{k}") == recall_at(after.ir[captions], k)
        assert row.value(f"asr_tr@{k}") == attack_success_rate(before.tr[list(ROWS)], after.tr[list(ROWS)], k)
        assert row.value(f"asr_ir@{k}") == attack_success_rate(before.ir[captions], after.ir[captions], k)
    assert (row.n_images, row.n_captions, row.gallery_images) == (4, int(captions.sum()), 11)
    assert row.max_distance == pytest.approx(8 / 255, abs=1e-6)
    assert row.ci["ir@5"][0] <= row.ir_5 <= row.ci["ir@5"][1]
    ranks = gallery_ranks(clean, ROWS)
    assert torch.equal(torch.tensor(ROWS)[ranks.txt2img], before.txt2img[captions])


def test_another_subset_is_refused(model: DualEncoder, split: Split, pgd: PGD) -> None:
    attacked = some_attacked(model, pgd, split(1))
    with pytest.raises(UserError, match=r"is not the subset \(3 images"):
        evaluate_subset(model, attacked, clean=encode_gallery(model, split(4)), rows=ROWS[:3], setting=SETTING)


@dataclasses.dataclass(frozen=True)
class Grey:
    def __call__(self, row: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (row, row, row))


@pytest.mark.parametrize("of", [1, 2, 3])
def test_processes_share_the_batches_of_one(of: int) -> None:
    n = 11
    dataset = RetrievalSet(
        name="d",
        split="test",
        captions=tuple((f"a {i}", f"b {i}") for i in range(n)),
        ids=tuple(map(str, range(n))),
        group=tuple(range(n)),
        load=Grey(),
    )
    batches = evaluation_batches(dataset, ImageTransform(size=8), batch_size=3)
    rows = draw_rows(n, 8, seed=0)
    whole = list(picked(batches, rows))
    assert torch.cat([batch.index for batch in whole]).tolist() == list(rows)
    assert [len(batch) for batch in whole] == [3, 3, 2]
    assert all(torch.equal(batch.images[:, 0, 0, 0].mul(255).round().long(), batch.index) for batch in whole)
    for share in range(of):
        own = picked(batches, rows, share=share, of=of)
        assert len(own) == len(whole[share::of])
        for found, expected in zip(own, whole[share::of], strict=True):
            assert torch.equal(found.images, expected.images) and found.texts == expected.texts
            assert torch.equal(found.index, expected.index)
    assert pick(dataset, rows).ids == tuple(map(str, rows))
    assert draw_rows(n, 8, seed=0) == rows != draw_rows(n, 8, seed=1)
