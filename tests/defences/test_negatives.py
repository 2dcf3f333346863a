"""Hard negatives against the loop of the papers' code: the same chances, never the own group, nothing waits."""

import pytest
import torch
from training.synthetic import make_batch

from fastmat.attacks.draws import SeededDraws
from fastmat.defences.negatives import check_negatives, draw_columns, negative_weights, uniform_of_texts
from fastmat.errors import UserError


def published_weights(logits: torch.Tensor, rows: list[int], columns: list[int]) -> torch.Tensor:
    """Row by row: softmax over all, zero where the group is the same; what is left, as shares."""
    found = torch.zeros_like(logits)
    for i, row in enumerate(logits):
        chance = row.softmax(0)
        for j in range(len(row)):
            found[i, j] = 0 if rows[i] == columns[j] else chance[j]
        found[i] /= found[i].sum()
    return found


def test_weights_are_the_published_ones():
    torch.manual_seed(0)
    logits, rows, columns = torch.randn(5, 7), [3, 4, 3, 5, 6], [3, 3, 4, 5, 6, 6, 8]
    got = negative_weights(logits, torch.tensor(rows), torch.tensor(columns))
    torch.testing.assert_close(got, published_weights(logits, rows, columns))


def test_far_logits_keep_a_negative():
    """Where the own group takes all of the softmax, the published weights vanish; these do not."""
    got = negative_weights(torch.tensor([[300.0, 0.0, 1.0]]), torch.tensor([0]), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.2689414, 0.7310586]]))


def test_drawn_as_often_as_weighed():
    weights = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    uniform = torch.arange(10_000) / 10_000
    drawn = draw_columns(weights.expand(10_000, 6), uniform)
    assert torch.bincount(drawn, minlength=6).tolist() == pytest.approx([0, 5000, 0, 2000, 3000, 0], abs=1)


def test_never_a_column_without_weight():
    torch.manual_seed(0)
    weights = torch.rand(4096, 33) * (torch.rand(4096, 33) < 0.2)
    weights[:, 7] += 1e-3
    for value in (0.0, 1e-30, 0.5, 1 - 2**-24):
        drawn = draw_columns(weights, torch.full((4096,), value))
        assert bool((weights.gather(1, drawn[:, None]) > 0).all())
    assert draw_columns(torch.zeros(2, 3), torch.tensor([0.0, 0.9])).tolist() == [0, 0]


def test_no_negative_is_an_error():
    group = torch.tensor([1, 1, 2])
    check_negatives(group, group)
    with pytest.raises(UserError, match="belongs to one image; raise batch_size, or set itm to 0"):
        check_negatives(torch.tensor([1, 1]), torch.tensor([1, 1]))
    nowhere = torch.zeros(1, dtype=torch.int64, device="meta")  # as on a GPU: only what the shape says
    with pytest.raises(UserError, match="belongs to one image"):
        check_negatives(nowhere, nowhere)
    check_negatives(torch.zeros(2, device="meta"), nowhere)


def test_numbers_belong_to_captions():
    """Keyed by image and place: a part of the batch has the numbers that the whole gives it."""
    batch = make_batch(size=6)
    whole = uniform_of_texts(SeededDraws(3), "negative_image", batch)
    assert len(whole.unique()) == len(batch.texts) and bool(((whole >= 0) & (whole < 1)).all())
    part = uniform_of_texts(SeededDraws(3), "negative_image", batch.rows(2, 5))
    first = int((batch.txt2img < 2).sum())
    assert torch.equal(part, whole[first : first + len(part)])
