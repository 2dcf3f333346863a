"""The page of an augmented set: every figure on it, nothing of the data as markup, equal bytes for equal input."""

import json
import re
from pathlib import Path

from fastmat.augment.results import Estimate, SourceReport
from fastmat.report.augmentation import render_augmentation, write_augmentation_report


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.01, high=value + 0.02)


HUMAN = SourceReport(
    source="human",
    made="caption",
    images=20,
    items=1200,
    alignment=estimate(0.612),
    relative_alignment=None,
    diversity=estimate(0.254),
    word_diversity=estimate(0.851),
    gap=None,
)
MINE = SourceReport(
    source="mine:<b>f</b>",
    made="caption",
    images=19,
    items=38,
    alignment=estimate(0.584),
    relative_alignment=estimate(-0.028),
    diversity=estimate(0.271),
    word_diversity=estimate(0.733),
    gap=estimate(3.7),
)
PAINTED = SourceReport(
    source="text_to_image",
    made="image",
    images=7,
    items=7,
    alignment=estimate(0.5),
    relative_alignment=estimate(-0.112),
    diversity=None,
    word_diversity=None,
    gap=estimate(12.5),
)
ALL = [HUMAN, MINE, PAINTED]


def test_the_page_holds_every_figure_and_escapes_names() -> None:
    page = render_augmentation(ALL, title="set <one>", about={"seed": 0, "path": "<script>"})
    assert "set &lt;one&gt;" in page and "mine:&lt;b&gt;f" in page and "&lt;script&gt;" in page
    assert "<script" not in page and "<b>f</b>" not in page
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    rows = [re.findall(r"<td>(.*?)<small>(.*?)</small>", row) for row in table.split("<tr>")[1:]]
    assert rows[0] == [
        ("0.612", "0.602 to 0.632"),
        ("", ""),
        ("0.254", "0.244 to 0.274"),
        ("0.851", "0.841 to 0.871"),
        ("", ""),
    ]
    assert [value for value, _ in rows[1]] == ["0.584", "-0.028", "0.271", "0.733", "3.70"]
    assert [value for value, _ in rows[2]] == ["0.500", "-0.112", "", "", "12.50"]
    assert "1,200 captions of 20 images" in table and "7 images of 7 images" in table
    assert "Text-to-image" in table and "src=" not in page and "url(http" not in page


def test_the_plot_has_one_dot_per_value_and_source() -> None:
    page = render_augmentation(ALL, title="set", about={})
    svg = page[page.index("<svg") : page.index("</svg>")]
    for colour, count in {"#8f9bab": 2, "#d9913d": 4, "#5a9e80": 2}.items():  # human, mine, painted
        assert len(re.findall(rf"<use [^>]*fill: {colour}", svg)) == count
        assert len(re.findall(rf'stroke: {colour}; stroke-width: 2"', svg)) == count
    # alignment of mine is better than that of the painted ones: further right, one line above
    (mine, *_), (painted, *_) = (
        [(float(x), float(y)) for x, y in re.findall(rf'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: {c}', svg)]
        for c in ("#d9913d", "#5a9e80")
    )
    assert mine[0] > painted[0] and mine[1] < painted[1]


def test_what_is_written_can_be_read_and_is_equal_for_equal_input(tmp_path: Path) -> None:
    page = write_augmentation_report(tmp_path / "a", ALL, title="set", about={"seed": 3})
    assert page == tmp_path / "a" / "augment.html"
    content = json.loads((tmp_path / "a" / "augment.json").read_text())
    assert content["seed"] == 3
    assert [one["source"] for one in content["sources"]] == ["human", MINE.source, "text_to_image"]
    assert content["sources"][1]["gap"] == {"value": 3.7, "low": 3.7 - 0.01, "high": 3.7 + 0.02}
    assert content["sources"][0]["gap"] is None
    again = write_augmentation_report(tmp_path / "b", ALL, title="set", about={"seed": 3})
    assert again.read_bytes() == page.read_bytes()
