"""The study of test-time defences end to end with next to no training; its verdicts and intervals by hand."""

import json
from pathlib import Path

import pytest
import torch
from cli.conftest import Fastmat, fastmat  # noqa: F401
from sklearn.metrics import roc_auc_score
from torch import Tensor

from fastmat.cli.load import read_yaml, validate
from fastmat.evaluation.stages import Counts
from fastmat.studies.test_time import Study
from fastmat.studies.test_time_config import Config
from fastmat.studies.test_time_results import Verdict
from fastmat.studies.test_time_verdicts import CLEAN, Bootstrap, answer, detection, judge, with_means

TINY = [
    "mlm_steps=null", "limit=8", "test_batch_size=4", "detector.images=8", "models.plain.pretrain=null",
    "models.mat.pretrain=null", "models.mat.defence={name: tecoa_itr, steps: 1}",
    "attacks={pgd: {name: pgd, steps: 1}, square: {name: square, n_queries: 2}}",
    "guards={resize_pad: {name: resize_pad}, frequency_masking: {name: frequency_masking}}",
]  # fmt: skip
ATTACKS = ("pgd", "square")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study") / "out"


def study(fastmat: Fastmat, out: Path, *more: str) -> tuple[int, str, str]:  # noqa: F811
    return fastmat("study", "test-time", "--short", "--out", out, *TINY, *more)


def test_every_cell_and_going_on(fastmat: Fastmat, out: Path) -> None:  # noqa: F811
    code, shown, error = study(fastmat, out)
    assert code == 0, error
    assert str(out / "report.html") in shown
    results = json.loads((out / "results.json").read_text())
    lines = {(line["model"], line["guard"], line["attack"], line["made"]): line for line in results["lines"]}
    assert set(lines) == {
        (model, guard, attack, made)
        for model in ("plain", "mat")
        for guard, ways in (
            ("none", ("bare",)),
            ("resize_pad", ("bare", "guard")),
            ("frequency_masking", ("bare", "guard")),
        )
        for attack, made in [("none", ""), *((attack, way) for attack in ATTACKS for way in ways)]
    } | {(model, "frequency_masking", "evading_pgd", "guard") for model in ("plain", "mat")}
    assert {line["draws"] for line in lines.values() if line["made"] == "guard" and line["attack"] == "pgd"} == {2}
    assert {line["draws"] for line in lines.values() if line["made"] != "guard" or line["attack"] != "pgd"} == {1}
    for line in lines.values():
        values = {metric: value[0] for metric, value in line["values"].items()}
        assert all(low <= value <= high for value, low, high in line["values"].values())
        assert values["r@10"] == pytest.approx((values["tr@10"] + values["ir@10"]) / 2)
    for verdict in results["verdicts"]:
        own = [line for line in results["lines"] if all(line[key] == verdict[key] for key in ("model", "guard"))]
        bare = [line for line in results["lines"] if line["model"] == verdict["model"] and line["guard"] == "none"]
        value = {id(line): line["values"]["r@1"][0] for line in own + bare}
        least = min(value[id(line)] for line in bare if line["made"])
        assert verdict["clean"] == own[0]["values"]["r@1"]
        assert verdict["claimed"][0] == min(value[id(line)] for line in own if line["made"] == "bare")
        assert verdict["adaptive"][0] == min(value[id(line)] for line in own if line["made"])
        assert verdict["adaptive_gain"][0] == pytest.approx(verdict["adaptive"][0] - least)
        assert verdict["adaptive"][0] <= verdict["claimed"][0]
    assert len(results["verdicts"]) == 4
    assert {(own["model"], own["against"]) for own in results["detectors"]} == {
        (model, against)
        for model in ("plain", "mat")
        for against in (*ATTACKS, *(f"{attack} through frequency_masking" for attack in ATTACKS), "evading_pgd")
    }

    page = (out / "README.md").read_text()
    assert page.split("\n")[2] == f"**{' '.join(results['answer'])}**" and results["answer"][1] in shown
    assert "resize and pad: PGD, made through the guard (2 draws)" in page and "PGD that evades the detector" in page
    assert results["answer"][0] in (out / "report.html").read_text()
    plots = ["mat-roc.svg", "mat-verdicts.svg", "plain-roc.svg", "plain-verdicts.svg"]
    assert sorted(file.name for file in out.glob("*.svg")) == plots and all(f"]({name})" in page for name in plots)
    assert (out / "report.html").read_text().count("<svg") == 4

    kept = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    assert study(fastmat, out)[0] == 2, "a folder in use needs --resume"
    code, shown, error = study(fastmat, out, "--resume", "guards.jpeg={name: jpeg}")
    assert code == 0, error
    made = {file for file in out.rglob("*.safetensors") if kept.get(file) != file.stat().st_mtime_ns}
    assert len(made) == 2 * 2 * 5 and {file.parent.name for file in made} == {"jpeg"}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("guards={jpg: {name: jpg}}", "unknown name 'jpg'; did you mean 'jpeg'?"),
        ("guards={none: {name: jpeg}}", "'none' is the bare model"),
        ("attacks={evading_pgd: {name: pgd}}", "'evading_pgd' is the study's own label"),
        ("guards={jpeg: {name: jpeg, quality: 200}}", "guards.jpeg: quality must be 1 to 100"),
        (
            "guards={f: {name: frequency_masking, detector: no.safetensors}}",
            "detector file no.safetensors does not exist",
        ),
        ("draws={pgd: 0}", "draws.pgd must be at least 1, got 0"),
        ("draws={pdg: 2}", "draws: 'pdg' is no label of attacks; did you mean 'pgd'?"),
        ("train_data={name: digits, split: test}", "detectors would be trained on images that they are judged on"),
        ("models.mat.train=null", "defence and train belong together"),
        ("models.plain.model={name: tiny, weights: no.safetensors}", "models.plain.model: weights file no.safetensors"),
        ("attacks={sga: {name: sga}}", "set mlm to a transformers BertForMaskedLM"),
        ("at=2", "input should be 1, 5 or 10"),
    ],
)
def test_refusals(fastmat: Fastmat, tmp_path: Path, told: str, said: str) -> None:  # noqa: F811
    more = [] if "draws" in told else ["draws={}"]
    code, _, error = study(fastmat, tmp_path / "out", *more, told)
    assert code == 2 and said in error and error.count("\n") == 1, error


def test_guards_are_judged_on_images_alone(tmp_path: Path) -> None:
    values = read_yaml("test-time-study")
    study = Study(validate(Config, values, source="test"), tmp_path)
    assert values["threat"]["max_words"] == 1 and study.threat.max_words == 0
    assert study.subjects.config.threat["max_words"] == 1  # what models are hardened against


def test_a_detector_of_another_size(fastmat: Fastmat, out: Path, tmp_path: Path) -> None:  # noqa: F811
    detector = next((out / "detectors").glob("plain-*.safetensors"))
    told = f"guards={{f: {{name: frequency_masking, detector: {detector}}}}}"
    more = ["models={tiny: {model: {name: tiny, image_size: 24}}}", "detector=null", "draws={}", told]
    code, _, error = study(fastmat, tmp_path / "out", *more)
    assert code == 2 and "trained on images of 32 x 32 pixels and cannot judge 24 x 24" in error, error
    assert error.count("\n") == 1


def counts(tr: list[int], ir: list[int]) -> dict[str, Counts]:
    """Hits of four images with one and of two captions each, the same at every K."""

    def of(hits: list[int], each: float) -> Counts:
        return Counts(torch.tensor(hits, dtype=torch.float64), torch.full((4,), each, dtype=torch.float64))

    return with_means({f"{way}@{k}": of(*hits) for way, hits in (("tr", (tr, 1)), ("ir", (ir, 2))) for k in (1, 5, 10)})


def test_a_verdict_by_hand() -> None:
    full, half, none = counts([1] * 4, [2] * 4), counts([1, 1, 0, 0], [2, 2, 0, 0]), counts([0] * 4, [0] * 4)
    bare = {CLEAN: full, ("pgd", "bare"): half, ("apgd", "bare"): none}
    own = {
        CLEAN: full, ("pgd", "bare"): full, ("apgd", "bare"): half, ("pgd", "guard"): full, ("apgd", "guard"): none,
    }  # fmt: skip
    bootstrap = Bootstrap(4, resamples=200)
    told = judge("m", "g", own, bare, "r@1", bootstrap)
    assert (told.claimed[0], told.claimed_by, told.claimed_gain[0]) == (50, "apgd", 50)
    assert (told.adaptive[0], told.adaptive_by, told.adaptive_gain) == (0, "apgd", (0, 0, 0))
    assert told.verdict == "gains nothing adaptively" and told.clean_gain == (0, 0, 0)
    assert told.claimed_gain[1] < 50 < told.claimed_gain[2]
    # The same hits on other images: the difference has an interval although both rates are equal.
    other = counts([0, 0, 1, 1], [0, 0, 2, 2])
    assert bootstrap.gain(other["r@1"], half["r@1"])[::2] == (0, 100)
    # An attack that the guard makes worse is left aside by who knows the guard.
    lazy = judge("m", "g", {**own, ("apgd", "guard"): full}, bare, "r@1", bootstrap)
    assert lazy.adaptive_by == "apgd, made on the bare model" and lazy.adaptive[0] == 50


def verdict(guard: str, claimed: float, adaptive: tuple[float, float, float]) -> Verdict:
    nothing = (0.0, 0.0, 0.0)
    return Verdict(
        model="m", guard=guard, clean=nothing, clean_gain=nothing, claimed=nothing, claimed_gain=(claimed, 0, 99),
        claimed_by="pgd", adaptive=nothing, adaptive_gain=adaptive, adaptive_by="pgd", verdict="",
    )  # fmt: skip


def test_the_answer_is_two_sentences_of_the_results() -> None:
    nothing = [verdict("jpeg", 40, (1, -1, 2)), verdict("ttc", 20, (0, 0, 0))]
    first, second = answer(nothing, at=1)
    assert first.startswith("It does not help:") and "JPEG on m, with +1.0 [-1.0, +2.0]" in first
    assert "JPEG on m looks best and seems to gain +40.0 [+0.0, +99.0]" in second and "+1.0 [-1.0" in second
    first, second = answer([*nothing, verdict("resize_pad", 10, (5, 3, 7))], at=10)
    assert "1 of 3 pairings" in first and "resize and pad on m +5.0 [+3.0, +7.0]; the others gain nothing" in first
    assert first.count(". ") == second.count(". ") == 0


def test_the_area_under_the_curve_and_its_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, attacked = torch.randn(40, generator=generator), torch.randn(40, generator=generator) + 1
    clean[:5] = attacked[:5]  # ties
    bootstrap = Bootstrap(40, resamples=50)
    told = detection("m", "pgd", clean, attacked, bootstrap, adaptive=False)

    def area(a: Tensor, b: Tensor) -> float:
        return 100 * float(roc_auc_score(torch.cat([torch.zeros(len(a)), torch.ones(len(b))]), torch.cat([a, b])))

    areas = []
    for row in bootstrap.drawn[0]:
        drawn = torch.repeat_interleave(torch.arange(40), row.long())
        areas.append(area(clean[drawn], attacked[drawn]))
    low, high = torch.tensor(areas).double().quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    assert told.auc == pytest.approx((area(clean, attacked), low, high))
    assert told.found[0] == 100 * float((attacked > 0).double().mean())
    assert told.false_alarms[0] == 100 * float((clean > 0).double().mean())
    assert told.curve[0] == (0, 0) and told.curve[-1] == (100, 100)
