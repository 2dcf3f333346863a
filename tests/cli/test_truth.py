"""`fastmat eval` under several ground truths: rows, tables and report, what is kept, refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmat.cli.table import table
from fastmat.evaluation.results import Results, Row, read_results, write_results

Fastmat = Callable[..., tuple[int, str, str]]
COMMON = ["victims.tiny={model: tiny}", "resamples=20", "examples=0", "threat.eps=8/255"]
PGD = "attacks.pgd={name: pgd, steps: 1}"
# Captions of image i have the ids 10 i and 10 i + 1. Images 0 and 4 query, and three captions.
IMAGES = {"0": [0, 1, 40, 41], "4": [40, 41, 1]}
TEXTS = {"0": [0, 4], "1": [0, 4], "20": [2, 3, 5]}


@pytest.fixture
def annotations(pictures: Path, tmp_path: Path) -> Path:
    """ECCV Caption's files and COCO's for the six pictures, whose names end in their numbers."""
    folder = tmp_path / "eccv"
    folder.mkdir()
    captions = [row["caption"] for row in json.loads((pictures / "test.json").read_text())]
    rows = [
        {"image_id": image, "id": 10 * image + n, "caption": f"{text.capitalize()}. "}
        for image, own in enumerate(captions)
        for n, text in enumerate(own)
    ]
    original = {image: [10 * image, 10 * image + 1] for image in range(len(captions))}
    written = {
        "captions_val2014": {"annotations": rows},
        "eccv_image_to_caption": IMAGES,
        "eccv_caption_to_image": TEXTS,
        "original_image_to_caption": original,
    }
    for name, content in written.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def eccv(annotations: Path, settings: list[str]) -> list[str]:
    """Overrides; captions are read as ALBEF reads them."""
    captions = annotations / "captions_val2014.json"
    truth = {"name": "eccv_caption", "folder": str(annotations), "captions": str(captions)}
    return [*settings, "data.captions=albef", f"truths.eccv={json.dumps(truth)}"]


def by_attack(folder: Path) -> dict[str, Row]:
    return {row.attack: row for row in read_results(folder).rows}


def test_every_row_has_its_figures_under_both_truths(fastmat: Fastmat, eccv: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, shown, error = fastmat("eval", *eccv, *COMMON, PGD, "--out", out)
    assert code == 0, error
    told = "2 images with 7 right captions, 3 captions with 7 right images; 0 of 14 judgements left out"
    assert f"truths.eccv: {told}" in shown
    rows = by_attack(out)
    assert list(rows) == ["none", "pgd"]
    for row in rows.values():
        wide, pairs = row.truths["eccv"], row.truths["eccv/pairs"]
        assert (wide.n_images, wide.n_captions) == (pairs.n_images, pairs.n_captions) == (2, 3)
        assert wide.right_captions == pytest.approx(3.5) and wide.right_images == pytest.approx(7 / 3)
        assert pairs.right_captions == 2 and pairs.right_images == 1
        for k in (1, 5, 10):  # more right answers are found no later
            for way in ("tr", "ir"):
                after, before = wide.metrics[f"{way}@{k}"], pairs.metrics[f"{way}@{k}"]
                assert after is not None and before is not None and after >= before
        assert set(wide.metrics) == set(pairs.metrics) and {"tr_rp", "ir_map@r", "asr_ir@10"} < set(wide.metrics)
        assert {"tr@1", "tr_map@r", "ir_rp"} <= set(wide.ci)
    assert rows["none"].truths["eccv"].metrics["asr_tr@10"] is None
    assert rows["pgd"].truths["eccv"].metrics["asr_tr@10"] is not None
    assert "eccv/pairs" in shown and "IR mAP@R" in shown
    report = (out / "report.html").read_text()
    assert "Under other ground truths" in report and "eccv" in report and "mAP@R" in report


def test_rows_are_kept_while_the_truth_is_the_same(
    fastmat: Fastmat, eccv: list[str], annotations: Path, tmp_path: Path
) -> None:
    words = ["eval", *eccv, *COMMON, "--out", tmp_path / "out"]
    assert fastmat(*words)[0] == 0
    assert "1 of 1 rows kept" in fastmat(*words, "--resume")[1]
    (annotations / "eccv_caption_to_image.json").write_text(json.dumps({**TEXTS, "20": [2, 3]}))
    before = by_attack(tmp_path / "out")["none"]
    code, shown, error = fastmat(*words, "--resume")
    assert code == 0 and "rows kept" not in shown, error
    assert by_attack(tmp_path / "out")["none"].truths["eccv"].right_images == 2 != before.truths["eccv"].right_images


def test_without_other_truths_a_row_is_what_it_was(
    fastmat: Fastmat, eccv: list[str], settings: list[str], tmp_path: Path
) -> None:
    plain = [*settings, "data.captions=albef"]
    assert fastmat("eval", *plain, *COMMON, "--out", tmp_path / "plain")[0] == 0
    assert fastmat("eval", *eccv, *COMMON, "--out", tmp_path / "eccv-rows")[0] == 0
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text())["rows"][0] for name in ("plain", "eccv-rows")
    )
    assert "truths" not in one and "Under other" not in (tmp_path / "plain/report.html").read_text()
    assert {**one, "inputs": None} == {key: two[key] for key in one} | {"inputs": None}
    assert one["inputs"] != two["inputs"]
    row = Row.model_validate(two)
    assert Results.model_validate({"rows": [one, two], "config": {}, "environment": {}}).rows[1] == row
    assert "eccv" in table([row]) and "eccv" not in table([Row.model_validate(one)])


def test_ensembles_and_subsets(fastmat: Fastmat, eccv: list[str], tmp_path: Path) -> None:
    strongest = (
        "attacks.strongest={name: strongest, objectives: [margin_i2t, cosine], include: [], steps: 1, restarts: 1, "
        "rounds: 1}"
    )
    words = ["eval", *eccv, *COMMON, PGD, strongest, "subset.strongest=4", "--out", tmp_path / "out"]
    code, _, error = fastmat(*words)
    assert code == 0, error
    runs = [row for row in read_results(tmp_path / "out").rows if row.attack.startswith("strongest.")]
    worst = by_attack(tmp_path / "out")["strongest"].truths
    assert len(runs) == 2 and 0 < worst["eccv"].n_captions <= 3
    for row in (*runs, by_attack(tmp_path / "out")["strongest"]):
        assert row.truths["eccv"].n_images == worst["eccv"].n_images
    for metric in ("ir@1", "ir@5", "ir_rp", "ir_map@r"):
        value = worst["eccv"].metrics[metric]
        assert value is not None
        assert all(value <= (row.truths["eccv"].metrics[metric] or 0) for row in runs)
    total = len(read_results(tmp_path / "out").rows)
    assert f"{total} of {total} rows kept" in fastmat(*words, "--resume")[1]
    # The worst case is made anew from the ranks that were kept.
    results = read_results(tmp_path / "out")
    rows = [row for row in results.rows if row.attack != "strongest"]
    write_results(tmp_path / "out", results.model_copy(update={"rows": rows}))
    assert f"{total - 1} of {total} rows kept" in fastmat(*words, "--resume")[1]
    assert by_attack(tmp_path / "out")["strongest"].truths == worst


def test_equal_captions_of_the_set_itself(fastmat: Fastmat, tmp_path: Path) -> None:
    data = "data={name: labelled_digits, split: test, label: colour}"
    words = [data, "limit=30", "truths.same=same_captions", *COMMON, PGD]
    code, shown, error = fastmat("eval", *words, "--out", tmp_path / "out")
    assert code == 0, error
    assert "truths.same: " in shown
    for row in read_results(tmp_path / "out").rows:
        for metric in ("tr@1", "tr@10", "ir@5"):
            assert row.truths["same"].metrics[metric] == pytest.approx(row.value(metric))


BAD: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "other captions": (
        lambda folder: (folder / "captions_val2014.json").write_text(
            json.dumps({"annotations": [{"image_id": 0, "id": 1, "caption": "what"}]})
        ),
        [],
        "truths.eccv: 12 of 12 captions of six/test are not in",
    ),
    "another set": (
        lambda folder: (folder / "original_image_to_caption.json").write_text(json.dumps({"77": [770]})),
        [],
        "judges no image of six/test: it is of another set or split",
    ),
    "empty": (
        lambda folder: (folder / "eccv_image_to_caption.json").write_text("{}"),
        [],
        "with at least one query",
    ),
    "no right answer": (
        lambda folder: (folder / "eccv_caption_to_image.json").write_text(json.dumps({**TEXTS, "10": []})),
        [],
        "nothing is right for 10",
    ),
    "a part": (lambda folder: None, ["limit=3"], "set partial: true"),
    "no such truth": (lambda folder: None, ["truths.more=eccv_captions"], "unknown name 'eccv_captions'"),
    "a missing key": (lambda folder: None, ["truths.more=cxc"], "truths.more: 'ratings' is missing"),
    "the set is given": (
        lambda folder: None,
        ["truths.more={name: same_captions, dataset: 1}"],
        "'dataset' is not set here",
    ),
    "nothing new": (lambda folder: None, ["truths.more=same_captions"], "truths.more: no two images of six/test"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_truths(case: str, fastmat: Fastmat, eccv: list[str], annotations: Path, tmp_path: Path) -> None:
    spoil, words, said = BAD[case]
    spoil(annotations)
    code, _, error = fastmat("eval", *eccv, *COMMON, *words, "--out", tmp_path / "out")
    assert code == 2
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out/results.json").exists()
