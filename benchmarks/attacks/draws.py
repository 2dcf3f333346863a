"""Where opponents take their noise from; all of these can stand where the attacks' own draws stand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class HostDraws:
    """NumPy on the host in double precision, then cast and copied, as published; a stream, not keyed by sample."""

    def __init__(self, seed: int = 0) -> None:
        self.stream = np.random.RandomState(seed)

    def uniform(self, name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        return self._moved(self.stream.uniform(-1.0, 1.0, (len(index), *shape)), index)

    def normal(self, name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        return self._moved(self.stream.normal(0.0, 1.0, (len(index), *shape)), index)

    def _moved(self, drawn: object, index: Tensor) -> Tensor:
        return torch.from_numpy(drawn).float().to(index.device)


class DeviceDraws:
    """PyTorch's generator on the device: what a tuned loop uses."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.stream = torch.Generator(device).manual_seed(seed)

    def uniform(self, name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        drawn = torch.empty(len(index), *shape, device=index.device)
        return drawn.uniform_(-1.0, 1.0, generator=self.stream)

    def normal(self, name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        return torch.empty(len(index), *shape, device=index.device).normal_(generator=self.stream)
