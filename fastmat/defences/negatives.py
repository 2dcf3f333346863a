"""Hard negatives for matching (ALBEF, NeurIPS 2021, section 3.2): the more alike, the more often drawn.

Published code draws them one by one in a Python loop, which waits for the device twice per pair; here one call draws
them for the whole batch, from uniform numbers that are handed in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.errors import UserError
from fastmat.types import Batch


def negative_weights(logits: Tensor, row_group: Tensor, column_group: Tensor) -> Tensor:
    """[N, M], the chance of every column to be the negative of a row: softmax of the logits over the other groups.

    A row of zeros where no column is of another group.
    """
    same = row_group[:, None] == column_group
    return logits.masked_fill(same, -torch.inf).softmax(-1).nan_to_num(0.0)


def draw_columns(weights: Tensor, uniform: Tensor) -> Tensor:
    """[N] int64: of each row of weights [N, M] >= 0 a column, drawn in proportion; 0 for a row of zeros.

    uniform: [N] in [0, 1).
    """
    rising = weights.cumsum(-1)
    whole = rising[:, -1:]
    drawn = torch.searchsorted(rising, uniform[:, None] * whole, right=True)
    # The product may be rounded up to the whole; the last column with a weight is the first to reach it.
    last = (rising < whole).sum(-1, keepdim=True)
    return torch.minimum(drawn, last).squeeze(1).clamp_max(weights.shape[1] - 1)


def check_negatives(row_group: Tensor, column_group: Tensor) -> None:
    """Raise UserError where a row has no negative; on a GPU, where looking would wait, only for one row and column."""
    alone = len(row_group) == len(column_group) == 1
    if alone or (row_group.device.type == "cpu" and not bool((row_group[:, None] != column_group).any(1).all())):
        raise UserError(
            "matching needs a negative for every pair, and all that it may be sought among belongs to one image; "
            "raise batch_size, or set itm to 0"
        )


def uniform_of_texts(draws: Draws, name: str, batch: Batch) -> Tensor:
    """[T] in [0, 1), keyed by a caption's image and its place among the image's captions."""
    place = torch.arange(len(batch.txt2img), device=batch.txt2img.device)
    place = place - torch.searchsorted(batch.txt2img, batch.txt2img)  # captions of an image stand together, in order
    key = batch.index[batch.txt2img] * 4096 + place
    return ((draws.uniform(name, key, ()) + 1) / 2).clamp(0, 1 - 2**-24)
