"""What whole attacks are to reach beside their opponents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastmat.benchmarks.attacks.rows import AttackRow


@dataclass(frozen=True, kw_only=True)
class AttackTarget:
    """At least `bound` times the speed of an opponent, for the whole attack.

    dtype: ours; a published loop is always fp32, a tuned one has our dtype.
    """

    device: str
    attack: str
    dtype: str
    opponent: str
    bound: float

    def asked(self) -> str:
        return f"at least {self.bound:g} times the speed of {self.opponent}"

    def measured(self, rows: Sequence[AttackRow]) -> float | None:
        """From the rows of one run; None where one is missing."""
        ours = next((row for row in rows if row.kind == "fastmat" and row.dtype == self.dtype), None)
        dtype = "float32" if self.opponent == "published" else self.dtype
        other = next((row for row in rows if row.kind == self.opponent and row.dtype == dtype), None)
        return None if ours is None or other is None else other.p50 / ours.p50

    def verdict(self, rows: Sequence[AttackRow]) -> str:
        """ "yes", or "no" and where our time goes."""
        figure = self.measured(rows)
        if figure is None:
            return "-"
        if figure >= self.bound:
            return "yes"
        ours = next(row for row in rows if row.kind == "fastmat" and row.dtype == self.dtype)
        other = next(row for row in rows if row.kind == self.opponent)
        part, share = max(ours.shares.items(), key=lambda item: item[1])
        return f"no: {share:.0%} of our time is {NAMES[part]}{same_work(part, ours, other)}"


NAMES = {
    "mlm": "the language model",
    "text": "the text encoder",
    "image": "the image encoder",
    "other": "outside models",
}
WORK = {
    "mlm": ("mlm_sequences", "sequences"),
    "text": ("text_encodings", "texts"),
    "image": ("image_backwards", "image gradients"),
}


def same_work(part: str, ours: AttackRow, other: AttackRow) -> str:
    """How much of it there is, where that was counted."""
    if part not in WORK:
        return ""
    key, what = WORK[part]
    return f", on {ours.counts.get(key, 0)} {what} where the opponent has {other.counts.get(key, 0)}"


def target(device: str, attack: str, dtype: str, opponent: str, bound: float) -> AttackTarget:
    return AttackTarget(device=device, attack=attack, dtype=dtype, opponent=opponent, bound=bound)


TARGETS = (
    target("cuda", "sga", "bfloat16", "published", 30),
    target("cuda", "sga", "float32", "published", 5),
    target("cuda", "sga", "bfloat16", "tuned", 4),
    target("cuda", "bert_attack", "bfloat16", "published", 40),
    target("cuda", "bert_attack", "bfloat16", "tuned", 15),
    target("cuda", "co_attack", "bfloat16", "published", 50),
    target("cuda", "pgd", "bfloat16", "published", 8),
    target("cuda", "pgd", "bfloat16", "tuned", 1.5),
    target("cuda", "pgd B=1", "bfloat16", "tuned", 3),
    target("cuda", "sa_aet", "bfloat16", "published", 40),
    target("cpu", "sga", "float32", "published", 3),
    target("cpu", "sga", "bfloat16", "published", 6),
    target("cpu", "bert_attack", "float32", "published", 8),
    target("cpu", "co_attack", "float32", "published", 10),
    target("cpu", "pgd", "float32", "published", 1.25),
    target("cpu", "pgd", "bfloat16", "published", 2.5),
    target("cpu", "sa_aet", "float32", "published", 10),
)
