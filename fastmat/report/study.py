"""The page and the tables of a study, whatever it is about: plain values in, HTML and Markdown out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmat.report.page import page


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A rate as text, with its interval; both are empty where there is none, and other text has no interval."""

    value: str = ""
    interval: str = ""

    @classmethod
    def of(cls, estimate: tuple[float, float, float] | None) -> Rate:
        """(value, low, high)."""
        if estimate is None:
            return cls()
        value, low, high = estimate
        return cls(value=f"{value:.1f}", interval=f"{low:.1f} to {high:.1f}")

    def plain(self) -> str:
        interval = f" [{self.interval.replace(' to ', ', ')}]" if self.interval else ""
        return f"{self.value}{interval}" or "-"


@dataclass(frozen=True, kw_only=True)
class Table:
    """lines: a label, and a cell for every other name of the header."""

    title: str
    header: Sequence[str]
    lines: Sequence[tuple[str, Sequence[Rate]]]

    def markdown(self) -> str:
        rule = "|---" * len(self.header) + "|"
        rows = [f"| {label} | {' | '.join(cell.plain() for cell in cells)} |" for label, cells in self.lines]
        return "\n".join([f"| {' | '.join(self.header)} |", rule, *rows])


@dataclass(frozen=True, kw_only=True)
class Section:
    """plots: SVG elements with what they show."""

    title: str
    plots: Sequence[tuple[str, str]]
    tables: Sequence[Table]


def render_study(
    title: str, guide: str, sections: Sequence[Section], *, about: Mapping[str, Any], answer: str = ""
) -> str:
    """The page; answer: what was found, in a few sentences. Every text is escaped; plots stand as they are."""
    return page("study").render(
        title=title,
        answer=answer,
        guide=guide,
        sections=sections,
        about=json.dumps(dict(about), indent=2, ensure_ascii=False),
    )
