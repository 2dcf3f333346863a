"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math


def cosine_with_warmup(step: int, *, steps: int, warmup_steps: int) -> float:
    """Share of the peak rate at `step` (from 0): linear up over the warm-up, then a half cosine down to 0 at `steps`.

    >>> [round(cosine_with_warmup(s, steps=6, warmup_steps=2), 3) for s in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps))) / 2
