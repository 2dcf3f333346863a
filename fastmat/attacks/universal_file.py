"""A fitted universal perturbation to disk and back: an image delta, a word, and the budget they were fitted within."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmat.errors import UserError
from fastmat.types import Norm


@dataclass(frozen=True, kw_only=True)
class UniversalPerturbation:
    """delta [3, H, W] fp32 on the CPU, within `eps` in `norm`; word: None where no word may be substituted."""

    delta: Tensor
    word: str | None
    eps: float
    norm: Norm

    def at(self, height: int, width: int) -> Tensor:
        """delta [3, height, width]: bilinear and, where it shrinks, averaging, so that no pixel exceeds its largest."""
        if self.delta.shape[1:] == (height, width):
            return self.delta
        return F.interpolate(self.delta[None], (height, width), mode="bilinear", antialias=True)[0]

    def save(self, path: Path) -> None:
        """As safetensors; the file appears whole or not at all."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        told = json.dumps({"word": self.word, "eps": self.eps, "norm": self.norm}, sort_keys=True)
        try:
            save_file({"delta": self.delta.contiguous()}, partial, metadata={"universal": told})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"the perturbation cannot be written to {path} ({error}); name another file") from error

    @classmethod
    def load(cls, path: Path) -> UniversalPerturbation:
        """Raises UserError on a file that `save` did not write."""
        if not Path(path).is_file():
            raise UserError(f"perturbation file {path} does not exist; fit one and save it there")
        try:
            with safe_open(path, "pt") as file:
                told = json.loads((file.metadata() or {})["universal"])
                found = cls(
                    delta=file.get_tensor("delta"), word=told["word"], eps=float(told["eps"]), norm=told["norm"]
                )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} holds no universal perturbation ({error}); fit one and save it") from error
        delta = found.delta
        if delta.dim() != 3 or len(delta) != 3 or delta.dtype != torch.float32 or not bool(delta.isfinite().all()):
            raise UserError(f"{path}: delta must be finite, [3, H, W] fp32, got {tuple(delta.shape)} {delta.dtype}")
        if found.word is not None and (not isinstance(found.word, str) or found.word.split() != [found.word]):
            raise UserError(f"{path}: word must be one word, got {found.word!r}")
        return found
