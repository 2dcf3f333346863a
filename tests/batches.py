"""Small random batches for tests."""

from collections.abc import Sequence

import torch

from fastmat.types import Batch

WORDS = ["red", "green", "blue", "dog", "cat", "bird", "runs", "sits", "near", "under", "big", "small", "tree", "house"]


def random_batch(captions: Sequence[int] = (2, 1, 3, 2), *, size: int = 32, seed: int = 0) -> Batch:
    """One image per entry of `captions`, with that many random captions of four to seven words."""
    generator = torch.Generator().manual_seed(seed)

    def caption() -> str:
        length = int(torch.randint(4, 8, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    n = len(captions)
    return Batch(
        images=torch.rand(n, 3, size, size, generator=generator),
        texts=tuple(caption() for _ in range(sum(captions))),
        txt2img=torch.repeat_interleave(torch.arange(n), torch.tensor(captions)),
        index=torch.arange(n) + 10,
        group=torch.arange(n) + 100,
    )
