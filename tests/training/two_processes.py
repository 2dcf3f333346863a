"""Run by torchrun in `test_distributed.py`: one short training per case, weights of each rank written apart."""

import math
import sys
from pathlib import Path

import torch
from training.synthetic import Synthetic, settings

from fastmat.defences.finetune import FineTune
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.training.loop import train


class NaNOnOneRank(FineTune):
    """Only rank 1 sees a NaN, and only at the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def loss(self, features):
        self.calls += 1
        bad = self.calls == 2 and torch.distributed.get_rank() == 1
        return {name: term * (math.nan if bad else 1.0) for name, term in super().loss(features).items()}


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for case, defence in (("plain", FineTune()), ("nan", NaNOnOneRank())):
        model = tiny_clip()
        report = train(model, defence, Synthetic(), settings=settings(steps=3), out=out / case, config={})
        rank = torch.distributed.get_rank()
        torch.save({"weights": model.state_dict(), "skipped": report.skipped}, out / f"{case}-{rank}.pt")
    try:
        train(tiny_clip(), FineTune(), Synthetic(size=5), settings=settings(steps=3), out=out / "odd", config={})
    except UserError as error:
        (out / f"odd-{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
