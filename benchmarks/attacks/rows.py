"""One measured implementation of one attack, as a line of rows.jsonl; written and read as the operators' rows are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AttackRow:
    """Rows of one attack, half and run share `time`, since ratios are taken within a run.

    half: "both", "text" or "image". p20, p50, p80: milliseconds of an attack on the whole batch (`setting` has its
    images and captions; `pairs` of them are attacked).
    counts: of one call, by hooks: text_encodings, text_calls, image_forwards, image_backwards, with_weight_gradients,
        mlm_sequences, mlm_calls. syncs: reads of the device by the host (on the CPU: what would be one).
    shares: of the time, by part (mlm, text, image, other). peak: bytes above the inputs.
    quality: against the published loop, or why there is nothing to say: words_tried, agreement, close, objective, asr.
    """

    time: str
    attack: str
    half: str
    setting: Mapping[str, int | float | str | bool]
    pairs: int
    dtype: str
    implementation: str
    kind: str
    rounds: int
    p20: float
    p50: float
    p80: float
    counts: Mapping[str, int]
    syncs: int | None
    shares: Mapping[str, float]
    peak: int | None
    quality: Mapping[str, float]
    device: str
    machine: str
    threads: int
    versions: Mapping[str, str]
    commit: str | None
    command: str

    @property
    def per_second(self) -> float:
        """Pairs per second."""
        return 1e3 * self.pairs / self.p50
