import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report.samples import NASTY, made_example, made_examples, made_results, made_row

from fastmat.errors import UserError
from fastmat.evaluation.results import Examples, Results, Threat, write_examples, write_results
from fastmat.report import tables
from fastmat.report.html import render, write_report
from fastmat.report.matrix import matrices
from fastmat.report.plots import attacks_plot, eps_plot, training_plot

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_EXAMPLES = Examples(chosen="", examples=[])


class Page(HTMLParser):
    """Words of the page, its elements, and every address in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.marked: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if "mark" in self.open:
            self.marked.append(data)


def one(rows: list) -> Results:
    return Results(rows=rows, config={}, environment={})


def test_page_holds_every_row_and_needs_nothing_else() -> None:
    results = made_results()
    html = render(results, made_examples())
    page = Page(html)
    for row in results.rows:
        for metric in tables.COLUMNS:
            if (value := row.value(metric)) is not None:
                assert f"{value:.1f} {row.ci[metric][0]:.1f}\u2013{row.ci[metric][1]:.1f}" in page.text
    # Clean, four attacks, three more radii, one transfer, its matrix.
    assert page.tags.count("tbody") == 1 + 4 + 3 + 1 + 1
    for words in (
        "eps 8/255 (L∞) 1 word white-box",
        "transferred from finetune",
        "1,000 images, 5,000 captions",
        "81.3",
    ):
        assert words.replace(") 1", "), 1") in page.text
    assert page.tags.count("svg") == 3 and "script" not in page.tags and "link" not in page.tags
    assert all(re.match(r"data:image/png;base64,|#", address) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", html)
    assert page.text.count("Fine-tuning") == 8 + 3 + 2


def test_text_out_of_the_data_is_escaped() -> None:
    rows = [made_row(), made_row(victim=NASTY, dataset=NASTY), made_row(victim="b", defence=NASTY, attack=NASTY, tr=1)]
    results = one(rows).model_copy(update={"config": {NASTY: NASTY}, "environment": {NASTY: NASTY}})
    html = render(results, Examples(chosen=NASTY, examples=[made_example(f"a red {NASTY}")]))
    page = Page(html)
    assert "script" not in page.tags
    assert page.text.count(NASTY) >= 6
    assert page.marked == ["marked", "red", "scarlet"]


def test_ids_are_unique_where_they_are_referred_to() -> None:
    html = render(
        one([*made_results().rows, *(r.model_copy(update={"split": "val"}) for r in made_results().rows)]), NO_EXAMPLES
    )
    page = Page(html)
    assert page.tags.count("svg") == 4
    referred = set(re.findall(r"url\(#([^)]+)\)", html)) | {a[1:] for a in page.addresses if a.startswith("#")}
    assert referred <= set(page.ids)


def test_best_values_are_marked_among_several_victims_under_attack_only() -> None:
    rows = [made_row(defence=d, attack=a, tr=tr) for a in ("none", "sga") for d, tr in (("finetune", 10), ("mat", 20))]
    rows.append(made_row(defence="mat", attack="pgd", tr=50))
    clean, sga, pgd = tables.tables(rows)[0].sections
    best = [[[cell.best for cell in line.cells] for line in part.lines] for part in (clean, sga, pgd)]
    assert best == [[[False] * 8] * 2, [[False] * 8, [True] * 8], [[False] * 8]]
    worse_recall_lower_asr = made_row(defence="fare", tr=1, **{"asr_tr@1": 3.0})
    part = tables.section([made_row(defence="mat", tr=30), worse_recall_lower_asr])
    assert [line.cells[6].best for line in part.lines] == [False, True]
    assert [line.cells[0].best for line in part.lines] == [True, False]


def test_sections_by_data_attack_budget_and_source() -> None:
    rows = [
        made_row(eps=4 / 255),
        made_row(attack="none"),
        made_row(eps=1 / 255),
        made_row(attack="bert_attack"),
        made_row(surrogate="other", eps=1 / 255),
        made_row(split="val"),
        made_row(seed=1, eps=1 / 255),
    ]
    first, second = tables.tables(rows)
    assert [(part.attack, part.budget, part.source, len(part.lines)) for part in first.sections] == [
        ("Clean", "", "", 1),
        ("SGA", "eps 1/255 (L∞), 1 word", "white-box", 2),
        ("SGA", "eps 1/255 (L∞), 1 word", "transferred from other", 1),
        ("SGA", "eps 4/255 (L∞), 1 word", "white-box", 1),
        ("BERT-Attack", "1 word", "white-box", 1),
    ]
    assert [line.label for line in first.sections[1].lines] == ["MAT, seed 0", "MAT, seed 1"]
    assert first.sections[1].lines[0].found == "1/255, 1 word"
    assert second.title == "digits, val: 1,000 images, 5,000 captions"
    l2 = made_row(threat=Threat(eps=0.5, norm="l2"), max_distance=0.4987, max_words_changed=0)
    assert tables.section([l2]).budget == "eps 0.5 (L2)" and tables.section([l2]).lines[0].found == "0.499"


def test_a_matrix_of_surrogates_and_victims_where_an_attack_was_transferred() -> None:
    white = [made_row(victim=name, surrogate=name, defence="none") for name in ("a", "b")]
    assert matrices([made_row(attack="none"), *white]) == []
    rows = [made_row(attack="pgd"), *white, made_row(surrogate="a", victim="b", tr=75, defence="none")]
    rows += [made_row(surrogate="c", victim="a", white_box=True, defence="none")]  # the same weights by another name
    (found,) = matrices(rows)
    assert (found.attack, found.budget, found.victims) == ("SGA", "eps 2/255 (L∞), 1 word", ["a", "b"])
    shown = [(name, [(cell.asr, cell.recall, cell.white_box) for cell in cells]) for name, cells in found.lines]
    own = [("70.0", "30.0", True), ("76.0", "24.0", True)]
    nothing = [("", "", False)] * 2
    assert shown == [
        ("a", [*own, ("25.0", "75.0", False), ("31.0", "69.0", False)]),
        ("b", [*nothing, *own]),
        ("c", [*own, *nothing]),
    ]
    assert [part.source for part in tables.tables(rows)[0].sections] == ["white-box", "white-box", "transferred from a"]


def test_some_queries_in_the_whole_gallery_have_a_table_of_their_own() -> None:
    some = made_row(n_images=100, n_captions=500, gallery_images=1000)
    assert [table.title for table in tables.tables([made_row(), some])] == [
        "digits, test: 1,000 images, 5,000 captions",
        "digits, test: 100 images, 500 captions attacked, of 1,000 images",
    ]


def test_plots_only_where_there_is_something_to_plot() -> None:
    single = made_row(attack="none")
    assert attacks_plot([single]) == "" and eps_plot([single, made_row()]) == "" and training_plot({}) == ""
    text_only = [made_row(attack="bert_attack", eps=e / 255) for e in (1, 2)]
    assert eps_plot(text_only) == ""
    drawn = eps_plot([single, made_row(eps=1 / 255), made_row(eps=2 / 255), made_row(surrogate="x", eps=8 / 255)])
    assert ">1/255<" in drawn and ">2/255<" in drawn and ">8/255<" not in drawn and ">clean<" in drawn
    bars = attacks_plot(
        [single, made_row(eps=2 / 255, tr=37), made_row(eps=8 / 255, tr=11), made_row(attack="pgd", tr=55)]
    )
    assert ">37<" in bars and ">55<" in bars and ">11<" not in bars  # 2/255 is the budget both attacks share


def test_bars_have_the_height_of_their_values() -> None:
    svg = attacks_plot([made_row(attack="none", tr=80), made_row(tr=20)])
    bars = re.findall(
        r'<path d="M [\d.]+ ([\d.]+) \nL [\d.]+ [\d.]+ \nL [\d.]+ ([\d.]+) [^"]*"[^>]*style="fill: #8f9bab"', svg
    )
    heights = [float(bottom) - float(top) for bottom, top in bars[:2]]
    assert heights[0] == pytest.approx(4 * heights[1], rel=1e-4)


def test_write_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json: no such file"):
        write_report(tmp_path)
    write_results(tmp_path, made_results())
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html" and "Examples" not in Page(path.read_text()).text
    write_examples(tmp_path, made_examples())
    assert "photo 17" in Page(write_report(tmp_path).read_text()).text
    kept = path.read_bytes()
    broken = json.loads((tmp_path / "examples.json").read_text())
    broken["examples"][0]["clean"] = 'x" onerror="alert(1)'
    (tmp_path / "examples.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match=r"examples\.json: key examples\.0\.clean"):
        write_report(tmp_path)
    assert path.read_bytes() == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["examples.json", "report.html", "results.json"]


def test_without_rows() -> None:
    assert "There are no rows" in Page(render(one([]), NO_EXAMPLES)).text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the report in")
def test_opens_in_a_browser(tmp_path: Path) -> None:
    write_results(tmp_path, made_results())
    write_examples(tmp_path, made_examples())
    path = write_report(tmp_path)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--disable-quic", "--window-size=1200,900"]
    flags += ["--enable-logging=stderr", "--log-level=0", f"--user-data-dir={tmp_path / 'profile'}"]
    # Everything but the file itself is out of reach, so a picture from elsewhere would be missing and complained of.
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000", "--dump-dom"]
    assert CHROMIUM is not None
    done = subprocess.run([CHROMIUM, *flags, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert ":CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    page = Page(done.stdout)
    assert "31.0 28.5\u201333.5" in page.text and "own at place 12" in page.text and NASTY in page.text
    assert page.tags.count("svg") == 3 and page.tags.count("img") == 2 * (3 + 2 * 5)
