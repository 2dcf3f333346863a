"""Draws handed in by a test instead of drawn."""

from collections.abc import Mapping, Sequence

from torch import Tensor


class RecordedDraws:
    """Answers each name with a recorded [B, ...] tensor; rows are chosen by sample index."""

    def __init__(self, draws: Mapping[str, Tensor]) -> None:
        self.draws = dict(draws)

    def uniform(self, name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        draw = self.draws[name][index]
        assert draw.shape[1:] == tuple(shape), f"{name}: recorded {tuple(draw.shape[1:])}, asked for {tuple(shape)}"
        return draw.clone()

    normal = uniform
