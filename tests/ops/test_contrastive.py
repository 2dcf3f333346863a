import math

import pytest
import torch
import torch.nn.functional as F

from fastmat.ops import contrastive_loss, contrastive_rows


def brute_force_rows(rows, columns, scale, row_group, column_group) -> list[float]:
    out = []
    for i in range(len(rows)):
        logits = [scale * float(rows[i] @ columns[j]) for j in range(len(columns))]
        top = max(logits)
        lse = top + math.log(sum(math.exp(v - top) for v in logits))
        own = [v for v, g in zip(logits, column_group.tolist(), strict=True) if g == int(row_group[i])]
        out.append(lse - sum(own) / len(own) if own else 0.0)
    return out


def unit(n: int, seed: int, dim: int = 5) -> torch.Tensor:
    return F.normalize(torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 7), (7, 3), (13, 13)])
def test_rows_against_brute_force(n: int, m: int, scale: float) -> None:
    rows, columns = unit(n, 0), unit(m, 1)
    row_group, column_group = torch.arange(n) % 4, torch.arange(m) % 3
    got = contrastive_rows(rows, columns, scale, row_group=row_group, column_group=column_group)
    want = brute_force_rows(rows, columns, scale, row_group, column_group)
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), atol=1e-5, rtol=1e-6)


def test_diagonal_is_clip_loss() -> None:
    images, texts = unit(6, 2).float(), unit(6, 3).float()
    logits = 10 * images @ texts.T
    want = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    ids = torch.arange(6)
    torch.testing.assert_close(contrastive_loss(images, texts, 10.0, image_group=ids, text_group=ids), want)


def test_gradients() -> None:
    images, texts = unit(4, 4).requires_grad_(), unit(6, 5).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    image_group, text_group = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 2, 2, 5])

    def loss(a, b, s):
        return contrastive_loss(a, b, s, image_group=image_group, text_group=text_group)

    assert torch.autograd.gradcheck(loss, (images, texts, scale))


def test_soft_targets_against_the_written_out_mixture() -> None:
    rows, columns, soft_rows = unit(3, 6), unit(5, 7), unit(3, 8)
    row_group, column_group = torch.arange(3), torch.tensor([0, 1, 1, 2, 9])
    got = contrastive_rows(
        rows, columns, 4.0, row_group=row_group, column_group=column_group, soft_rows=soft_rows, alpha=0.3
    )
    logits, soft = 4 * rows @ columns.T, (4 * soft_rows @ columns.T).exp()
    for i in range(3):
        hard = (column_group == i).double()
        target = 0.3 * soft[i] / soft[i].sum() + 0.7 * hard / hard.sum()
        want = -(target * (logits[i] - logits[i].exp().sum().log())).sum()
        assert float(got[i]) == pytest.approx(float(want), rel=1e-9)
