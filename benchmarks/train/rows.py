"""One contestant of one training step, as a line of rows.jsonl; an attack's row with a floor."""

from __future__ import annotations

from dataclasses import dataclass

from fastmat.benchmarks.attacks.rows import AttackRow


@dataclass(frozen=True, kw_only=True)
class TrainRow(AttackRow):
    """attack: the step's name; half: always "both"; pairs: images, each with its caption.

    shares: text attack, image attack, outer, loading. quality: agreement of texts, pixels, loss_off, gradient_off.
    floor: milliseconds of the step's FLOPs at the machine's rate in this dtype, where the model's shape is known.
    """

    floor: float | None

    @property
    def utilisation(self) -> float | None:
        """The share of the time that the floor takes."""
        return None if self.floor is None else self.floor / self.p50
