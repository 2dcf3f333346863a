"""What training steps are to reach beside their opponents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastmat.benchmarks.train.rows import TrainRow

NAMES = {"text": "the text attack", "image": "the image attack", "outer": "the outer step", "loading": "loading"}


@dataclass(frozen=True, kw_only=True)
class TrainTarget:
    """At least `bound` times the speed of an opponent; or, of "finetune", at most `bound` times its time.

    dtype: ours, and that of fine-tuning; a tuned loop has it too. bound None: reported, not asked.
    """

    device: str
    attack: str
    dtype: str
    opponent: str
    bound: float | None

    def asked(self) -> str:
        if self.opponent == "finetune":
            limit = "reported" if self.bound is None else f"at most {self.bound:g}"
            return f"times the time of fine-tuning: {limit}"
        return f"at least {self.bound:g} times the speed of {self.opponent}"

    def measured(self, rows: Sequence[TrainRow]) -> float | None:
        """From the rows of one run; None where one is missing."""
        pair = self.pair(rows)
        if pair is None:
            return None
        ours, other = pair
        return ours.p50 / other.p50 if self.opponent == "finetune" else other.p50 / ours.p50

    def verdict(self, rows: Sequence[TrainRow]) -> str:
        """ "yes", or "no" and where our time goes."""
        figure, pair = self.measured(rows), self.pair(rows)
        if figure is None or pair is None:
            return "-"
        if self.bound is None:
            return "reported"
        if figure <= self.bound if self.opponent == "finetune" else figure >= self.bound:
            return "yes"
        part, share = max(pair[0].shares.items(), key=lambda item: item[1])
        used = pair[0].utilisation
        floor = "" if used is None else f", {used:.0%} of our time is the floor"
        return f"no: {share:.0%} of our time is {NAMES[part]}{floor}"

    def pair(self, rows: Sequence[TrainRow]) -> tuple[TrainRow, TrainRow] | None:
        """Ours and the opponent's. Of a published loop the last row: on a GPU that may be in fp16, as published."""
        ours = [row for row in rows if (row.kind, row.dtype) == ("fastmat", self.dtype)]
        others = [row for row in rows if row.kind == self.opponent]
        if self.opponent != "published":
            others = [row for row in others if row.dtype == self.dtype]
        return (ours[-1], others[-1]) if ours and others else None


def target(device: str, attack: str, dtype: str, opponent: str, bound: float | None) -> TrainTarget:
    return TrainTarget(device=device, attack=attack, dtype=dtype, opponent=opponent, bound=bound)


TARGETS = (
    target("cuda", "mat", "bfloat16", "published", 30),
    target("cuda", "mat", "bfloat16", "tuned", 3),
    target("cuda", "mat", "bfloat16", "finetune", 3),
    target("cuda", "fare", "bfloat16", "published", 8),
    target("cuda", "fare", "bfloat16", "tuned", 1.3),
    target("cuda", "tecoa", "bfloat16", "published", 6),
    target("cpu", "mat", "float32", "published", 3),
    target("cpu", "mat", "float32", "finetune", None),
    target("cpu", "fare", "float32", "published", 1.1),
    target("cpu", "fare", "bfloat16", "published", 1.3),
    target("cpu", "tecoa", "float32", "published", 4),
)
