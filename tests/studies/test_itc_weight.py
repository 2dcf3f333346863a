"""The study end to end with next to no training; what is finished is kept."""

import json
from pathlib import Path

import pytest
from cli.conftest import Fastmat, fastmat  # noqa: F401

from fastmat.build import Component
from fastmat.studies import itc_weight
from fastmat.studies.itc_weight import fused_defence, normalised, weighed_defence
from fastmat.studies.outcomes import read_outcome

FOG = "fog: {name: corruption, kind: fog, severity: 2}"
TINY = [
    "mlm_steps=null", "weights=[[1, 0], [0, 1]]", "limit=10", "train_limit=24", "test_batch_size=5",
    "fusion.model.widths=[8, 8]",
    "fusion.defences={tecoa_itr: {name: tecoa_itr, steps: 1}}",
    f"fusion.attacks={{itm: {{name: pgd, steps: 1, objective: itm}}, {FOG}}}", "clip.model.widths=[8, 8]",
    "clip.defences.mat={name: mat, steps: 1, text_search: embedding_space, distances: {image-adv-teacher: 0.1}}",
    "clip.pretrain=null", "clip.attacks={itc: {name: pgd, steps: 1}}",
]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study") / "out"


def study(fastmat: Fastmat, out: Path, *more: str) -> tuple[int, str, str]:  # noqa: F811
    return fastmat("study", "itc-weight", "--short", "--out", out, *TINY, *more)


def test_every_cell_and_going_on(fastmat: Fastmat, out: Path) -> None:  # noqa: F811
    code, shown, error = study(fastmat, out)
    assert code == 0, error
    assert str(out / "report.html") in shown
    results = json.loads((out / "results.json").read_text())
    lines = {(line["part"], line["weight"], line["attack"], line["scoring"]): line for line in results["lines"]}
    weights = ("1:0", "0:1")
    assert set(lines) == {
        *(("fusion", w, a, s) for w in weights for a in ("none", "itm", "fog") for s in ("itc", "itm", "itm+cosine")),
        *(("clip", w, a, "itc") for w in weights for a in ("none", "itc")),
    }
    for (part, _, attack, scoring), line in lines.items():
        values = {name: value and value[0] for name, value in line["values"].items()}
        assert all(value is None or value[1] <= value[2] for value in line["values"].values())
        assert ("drop_tr@1" in values) == (attack != "none")
        for way in ("tr", "ir") if part == "fusion" else ():
            if scoring == "itc":
                continue
            # What the shortlist keeps bounds what re-ranking can get right, and the two rates make the recall.
            assert values[f"{way}@1"] <= values[f"survival_{way}"]
            product = values[f"survival_{way}"] * (values[f"accuracy_{way}"] or 0) / 100
            assert values[f"{way}@1"] == pytest.approx(product)
    page = (out / "README.md").read_text()
    assert "TeCoA-ITR, ranked by ITM + cosine" in page and "| fog, 0:1 |" in page
    assert (out / "report.html").read_text().count("<svg") == 6
    assert sorted(file.name for file in out.glob("*.svg")) == [
        "clip-ir1.svg", "clip-tr1.svg", "fusion-ir1.svg", "fusion-stages-ir.svg", "fusion-stages-tr.svg",
        "fusion-tr1.svg",
    ]  # fmt: skip
    assert not list(out.rglob("checkpoints"))

    kept = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    assert study(fastmat, out)[0] == 2, "a folder in use needs --resume"
    more = "fusion.attacks.blur={name: corruption, kind: zoom_blur, severity: 1}"
    code, shown, error = study(fastmat, out, "--resume", more)
    assert code == 0, error
    made = {file for file in out.rglob("*.safetensors") if kept.get(file) != file.stat().st_mtime_ns}
    assert {file.name for file in made} == {"blur.safetensors"} and len(made) == 2
    assert "itm" not in shown


def test_a_damaged_cell_is_named(out: Path, tmp_path: Path) -> None:
    file = tmp_path / "none.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(itc_weight.UserError, match=r"none\.safetensors is damaged"):
        read_outcome(file, inputs="0")
    whole = next(out.rglob("cells/**/none.safetensors"))
    assert read_outcome(whole, inputs="of another study") is None
    assert read_outcome(tmp_path / "absent.safetensors", inputs="0") is None


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("weights=[[0, 0]]", "a ratio needs two numbers that are not negative, one above 0; got 0:0"),
        ("weights=[[1, 1], [1.0, 1.0]]", "each may stand once"),
        ("fusion.rerank_k=11", "fusion.rerank_k must be at most 10, got 11"),
        ("clip.defences={fare: {name: fare}}", "clip.defences.fare must be mat with distances"),
        ("fusion.defence={mat: {name: mat}}", "unknown key 'defence'"),
        ("fusion.attacks={fog: {name: corruption, kind: fogs}}", "there is no kind 'fogs'"),
    ],
)
def test_refusals(fastmat: Fastmat, tmp_path: Path, told: str, said: str) -> None:  # noqa: F811
    code, _, error = study(fastmat, tmp_path / "out", told)
    assert code == 2 and said in error and error.count("\n") == 1, error


def test_an_unknown_study(fastmat: Fastmat, tmp_path: Path) -> None:  # noqa: F811
    code, _, error = fastmat("study", "itc-weigth", "--out", tmp_path / "out")
    assert code == 2 and "no study 'itc-weigth'; did you mean 'itc-weight'" in error


def test_weights_and_inner_attacks() -> None:
    assert [normalised(w) for w in ((1.0, 0.0), (0.25, 1.0))] == [(2.0, 0.0), pytest.approx((0.4, 1.6))]
    tecoa, tuned = Component.parse("tecoa_itr", {"tecoa_itr": ""}), Component(name="mat", arguments={"objective": "kl"})

    def inner(defence: Component, weight: tuple[float, float], inner: str = "own") -> object:
        return fused_defence(defence, weight, inner=inner).get("objective")

    assert inner(tecoa, (1.6, 0.4)) == {"name": "itc_itm", "itc": 1.6, "itm": 0.4}
    assert inner(tecoa, (2.0, 0.0)) == {"name": "contrastive"} and inner(tecoa, (0.0, 2.0)) == {"name": "itm"}
    assert inner(tecoa, (2.0, 0.0), "itm") == {"name": "itm"}
    assert inner(tuned, (2.0, 0.0)) == "kl"
    assert inner(Component(name="finetune"), (1.0, 1.0)) is None
    mat = Component(name="mat", arguments={"pairs": {"adv-clean": 0.5}, "distances": {"image-adv-teacher": 0.1}})
    weighed = weighed_defence(mat, (1.6, 0.4))
    assert weighed["pairs"] == {"adv-clean": 0.8}
    assert weighed["distances"] == {"image-adv-teacher": pytest.approx(0.04)} and "trains" not in weighed
    assert weighed_defence(mat, (0.0, 2.0))["trains"] == ["image"]
