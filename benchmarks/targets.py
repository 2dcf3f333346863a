"""What the operators are to reach, and what the rows say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastmat.benchmarks.rows import Row

Quantity = Literal["speed-up", "time", "memory", "peak", "bandwidth"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound on one figure of one case.

    quantity: "speed-up", the fastest opponent's time over ours; "time", ours over it; "memory", the smallest peak of
        the opponents over ours; "peak", ours in GB; "bandwidth", ours over the opponent's, in percent.
    limit: what stands in the way, said where the bound is missed.
    """

    device: str
    operator: str
    case: str
    quantity: Quantity
    bound: float
    opponents: tuple[str, ...] = ()
    limit: str = ""

    @property
    def at_most(self) -> bool:
        return self.quantity in ("time", "peak")

    def asked(self) -> str:
        sign = "at most" if self.at_most else "at least"
        against = f" of {' or '.join(self.opponents)}" if self.opponents else " above the inputs"
        words = {"speed-up": "times the speed", "time": "times the time", "bandwidth": "% of the bandwidth"}
        words |= {"memory": "times less peak memory than that", "peak": "GB peak"}
        return f"{sign} {self.bound:g} {words[self.quantity]}{against}"

    def measured(self, rows: Sequence[Row]) -> float | None:
        """The figure, from the rows of one run of the case; None where one is missing."""
        ours = next((row for row in rows if row.kind == "fastmat"), None)
        others = [row for row in rows if row.implementation in self.opponents]
        if ours is None or (self.opponents and not others):
            return None
        if self.quantity == "peak":
            return None if ours.peak is None else ours.peak / 1e9
        if self.quantity == "memory":
            peaks = [row.peak for row in others if row.peak is not None]
            return min(peaks) / max(1, ours.peak) if ours.peak is not None and peaks else None
        if self.quantity == "bandwidth":
            rates = [row.moved / row.p50 for row in (ours, others[0]) if row.moved]
            return 100 * rates[0] / rates[1] if len(rates) == 2 else None
        ratio = min(row.p50 for row in others) / ours.p50
        return 1 / ratio if self.quantity == "time" else ratio

    def met(self, figure: float) -> bool:
        return figure <= self.bound if self.at_most else figure >= self.bound


PGD, CLIP, RANKS = "linf B=128 224px", "contrastive_loss", "5000 x 25000"
SCORES = "the product of the features (scores alone) takes as long, for both; ranks_of_scores is without it"
CLIP_LOSS, FUSED = ("open_clip ClipLoss",), ("memeff", "inf_cl")

TARGETS = (
    Target(device="cuda", operator="pgd_step", case=PGD, quantity="bandwidth", bound=85, opponents=("copy",)),
    Target(device="cuda", operator="pgd_step", case=PGD, quantity="speed-up", bound=4, opponents=("torchattacks",)),
    Target(device="cpu", operator="pgd_step", case=PGD, quantity="speed-up", bound=3, opponents=("torchattacks",)),
    Target(device="cuda", operator=CLIP, case="N=16384", quantity="speed-up", bound=4, opponents=CLIP_LOSS),
    Target(device="cuda", operator=CLIP, case="N=16384", quantity="memory", bound=70, opponents=CLIP_LOSS),
    Target(device="cuda", operator=CLIP, case="N=32768", quantity="speed-up", bound=1.3, opponents=FUSED),
    Target(device="cuda", operator=CLIP, case="N=65536", quantity="speed-up", bound=1.3, opponents=FUSED),
    Target(device="cuda", operator=CLIP, case="N=65536", quantity="peak", bound=0.3),
    Target(device="cpu", operator=CLIP, case="N=8192", quantity="memory", bound=10, opponents=CLIP_LOSS),
    Target(device="cpu", operator=CLIP, case="N=8192", quantity="time", bound=1.2, opponents=CLIP_LOSS),
    *(
        Target(
            device=device,
            operator="retrieval_ranks",
            case=RANKS,
            quantity="speed-up",
            bound=bound,
            opponents=("argsort on the host",),
            limit=SCORES,
        )
        for device, bound in (("cuda", 10), ("cpu", 4))
    ),
    *(
        Target(
            device=device,
            operator="scale_views",
            case=f"{name} B=8 384px",
            quantity="speed-up",
            bound=bound,
            opponents=("SGA",),
        )
        for device, bound in (("cuda", 5), ("cpu", 2))
        for name in ("antialias", "no antialias")
    ),
)
