"""The study end to end on tiny models; what is finished is kept; the answer says what the numbers say."""

import json
from pathlib import Path

import pytest
import torch
from cli.conftest import Fastmat, fastmat, mlm_folder  # noqa: F401

from fastmat.alignment.dynamic import Gate
from fastmat.alignment.file import write_corrections
from fastmat.evaluation.metrics import Ranks, worst_case
from fastmat.studies.channel_alignment_answer import answer
from fastmat.studies.channel_alignment_results import AlignmentResults
from fastmat.studies.channel_alignment_rows import rates, rows_of
from fastmat.studies.outcomes import read_outcome

TINY = [
    "mlm_steps=null", "limit=8", "calibration_images=6", "test_batch_size=4",
    "trained.defences={plain: {name: finetune}, mat: {name: tecoa_itr, steps: 1}}",
    "transfer_from={plain: mat, mat: plain}",
    "attacks={pgd: {name: pgd, steps: 1}, square: {name: square, n_queries: 2}}",
    "not_adaptive=[pgd, square]", "subset={square: 3}", "only={square: [dynamic]}",
]  # fmt: skip
CORRECTIONS = [
    "mean", "mean_variance", "least_squares", "least_squares_half", "constant_gate", "dynamic", "subspace", "shuffled",
    "random", "oracle",
]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study") / "out"


def study(fastmat: Fastmat, out: Path, *more: str) -> tuple[int, str, str]:  # noqa: F811
    return fastmat("study", "channel-alignment", "--short", "--out", out, *TINY, *more)


def test_every_cell_and_going_on(fastmat: Fastmat, out: Path) -> None:  # noqa: F811
    code, shown, error = study(fastmat, out)
    assert code == 0, error
    assert str(out / "report.html") in shown
    results = AlignmentResults.model_validate_json((out / "results.json").read_text())
    rows = {(row.model, row.correction, row.attack, row.made_on): row for row in results.rows}
    expected = set()
    for model in ("plain", "mat"):
        for correction in ("none", *CORRECTIONS):
            cells = [("none", ""), ("pgd", "corrected"), ("pgd", "other"), ("worst", "")]
            cells += [("pgd", "uncorrected")] if correction != "none" else []
            cells += [("square", "corrected"), ("all", "")] if correction in ("none", "dynamic") else []
            # What does not know of a correction stands beside what does, or not at all.
            cells += [("square", "uncorrected")] if correction == "dynamic" else []
            expected |= {(model, correction, *cell) for cell in cells}
    assert set(rows) == expected
    for key, row in rows.items():
        assert row.n_images == (3 if key[2] in ("square", "all") else 8)
        assert all(value is None or value[1] <= value[2] for value in row.values.values())
        if key[1] != "none":
            before = rows[key[0], "none", key[2], "corrected" if key[3] == "uncorrected" else key[3]]
            assert row.change["mean"][0] == pytest.approx(row.values["mean"][0] - before.values["mean"][0])
        if key[2] == "worst":
            assert row.values["r@1"][0] <= rows[(*key[:2], "pgd", "corrected")].values["r@1"][0] + 1e-9
    layers = {(layer.model, layer.layer) for layer in results.misalignment}
    assert layers == {
        (model, layer)
        for model in ("plain", "mat")
        for layer in ("block 1", "block 2", "projection input", "projection output")
    }
    assert all(0 <= layer.explained_by_shift[0] <= 1 for layer in results.misalignment if layer.explained_by_shift)
    removed = {(part.model, part.correction): part for part in results.removed}
    assert set(removed) == {(model, correction) for model in ("plain", "mat") for correction in CORRECTIONS}
    assert set(results.calibration.losses["mat"]) == {"none", *CORRECTIONS} - {"oracle"}
    static = ("mean", "mean_variance", "least_squares", "least_squares_half", "constant_gate")
    assert all(
        results.chosen[model] == min(static, key=losses.__getitem__)
        for model, losses in results.calibration.losses.items()
    )
    page = (out / "README.md").read_text()
    assert page.splitlines()[2] == f"**{results.answer[0]}**" and "PGD, made without it" in page
    assert sorted(file.name for file in out.glob("*.svg")) == ["channels.svg", "layers.svg", "recall.svg"]
    assert (out / "report.html").read_text().count("<svg") == 3

    kept = {file: file.stat().st_mtime_ns for file in (out / "cells").rglob("*.*")}
    kept |= {file: file.stat().st_mtime_ns for file in (out / "corrections").rglob("*.*")}
    assert study(fastmat, out)[0] == 2, "a folder in use needs --resume"
    given = f"corrections.given={{kind: file, path: '{out}/corrections/seed-0/{{model}}/dynamic.safetensors'}}"
    code, _, error = study(fastmat, out, "--resume", "corrections.far={kind: mean, shrinkage: 0.2}", given)
    assert code == 0, error
    made = {file for file in kept if kept[file] != file.stat().st_mtime_ns}
    # What every correction does to features stands in one file; nothing else that was there is touched.
    assert {file.name for file in made} == {"losses.json", "misalignment-pgd.json", "misalignment-square.json"}
    added = {file.parent.name for file in (out / "cells").rglob("*.safetensors") if file not in kept}
    assert added == {"far", "given"}
    again = json.loads((out / "results.json").read_text())["rows"]
    old = [row for row in again if row["correction"] not in added]
    assert old == [row.model_dump(mode="json") for row in results.rows]
    of = {(row["model"], row["correction"], row["attack"], row["made_on"]): row["values"] for row in again}
    assert all(
        of["mat", "given", *cell] == of["mat", "dynamic", *cell] for cell in (("none", ""), ("pgd", "corrected"))
    )


def test_adaptive_cells_by_hand(out: Path) -> None:
    """The ranks of a cell are those of an attack through the correction, on the model with the correction inside."""
    from fastmat.alignment.corrected import corrected
    from fastmat.alignment.file import read_corrections
    from fastmat.attacks.pgd import PGD
    from fastmat.build import Component, build_model
    from fastmat.cli.load import override, put, read_yaml, validate
    from fastmat.evaluation.evaluate import encode_gallery, gallery_context, gallery_ranks
    from fastmat.studies.channel_alignment import CONFIG, Config, Study

    values = read_yaml(CONFIG)
    for key, value in values["short"].items():
        put(values, key, value)
    for text in TINY:
        override(values, text)
    made = Study(validate(Config, values, source=CONFIG), out)
    component, *_ = made.component("mat", 0)
    assert isinstance(component, Component)
    plain = build_model(component)
    path = out / "corrections" / "seed-0" / "mat" / "dynamic.safetensors"
    model = corrected(plain, read_corrections(path, widths={"image": plain.image_projection.out_features}))
    batches = made.subject("mat", 0).batches
    context = gallery_context(encode_gallery(model, batches))
    attack = PGD(threat=made.threat, steps=1, seed=0)
    attacked = [batch.replace(images=attack(model, batch, context).images) for batch in batches]
    by_hand = gallery_ranks(encode_gallery(model, attacked))
    file = out / "cells" / "seed-0" / "mat" / "dynamic" / "pgd-corrected.safetensors"
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        stages = read_outcome(file, inputs=opened.metadata()["inputs"])
    assert stages is not None
    ranks = stages.ranks["itc"]
    assert torch.equal(ranks.tr, by_hand.tr) and torch.equal(ranks.ir, by_hand.ir)


def test_a_fusion_model_at_every_site(fastmat: Fastmat, tmp_path: Path, mlm_folder: Path) -> None:  # noqa: F811
    told = [
        "trained=null", f"mlm={mlm_folder}", "calibration={name: sga, steps: 1}", "sites=[image, text, tokens]",
        "models={a: {model: tiny_albef, rerank_k: 3}, b: {model: {name: tiny_albef, seed: 1}}}", "limit=5",
        "attacks={pgd: {name: pgd, steps: 1}, sga: {name: sga, steps: 1}}", "not_adaptive=[pgd, sga]", "subset={}",
        "transfer=[]", "transfer_from={}",
        "only={sga: [mean, dynamic]}",  # a search over words asks more than an oracle was told
        "corrections={mean: {kind: mean}, dynamic: {kind: gate}, oracle: {kind: oracle}}",
    ]  # fmt: skip
    code, _, error = study(fastmat, tmp_path / "out", *told)
    assert code == 0, error
    results = AlignmentResults.model_validate_json((tmp_path / "out" / "results.json").read_text())
    places = {(layer.encoder, layer.layer) for layer in results.misalignment if layer.by_channel}
    assert places == {("image", "projection output"), ("image", "tokens to fusion"), ("text", "projection output")}
    removed = {(part.correction, part.site): part.removed for part in results.removed if part.attack == "sga"}
    assert {site for _, site in removed} == {"image", "text", "tokens"}
    assert all(removed["oracle", site][0] == pytest.approx(100) for site in ("image", "text", "tokens"))
    rows = {(row.model, row.correction, row.attack, row.made_on): row.values for row in results.rows}
    # An oracle of everything, at every site, gives the clean recall back.
    assert rows["a", "oracle", "pgd", "uncorrected"] == rows["a", "none", "none", ""]


def test_an_oracle_in_a_model_that_is_folded(tmp_path: Path) -> None:
    """Folding batch norms encodes noise of its own before the first attack; an oracle must not be asked then."""
    from torch import nn

    from fastmat.alignment.oracle import Oracle
    from fastmat.attacks.pgd import PGD
    from fastmat.data.digits import digits_set
    from fastmat.data.loader import evaluation_batches
    from fastmat.models.tiny import tiny_clip
    from fastmat.studies.channel_alignment_cells import Run, Subject
    from fastmat.types import ThreatModel

    model = tiny_clip()
    blocks = model.image_tower.blocks
    blocks[1], blocks[4] = nn.BatchNorm2d(8), nn.BatchNorm2d(16)
    batches = evaluation_batches(digits_set("test").take(6), model.image_transform, batch_size=3)
    subject = Subject(
        label="m",
        key="k",
        model=model.eval(),
        sites=("image",),
        rerank=None,
        batches=batches,
        folder=tmp_path,
        say=print,
    )
    run = Run(label="pgd", attack=PGD(threat=ThreatModel(eps=16 / 255), steps=1), rows=None, inputs="i")
    modules = {"image": Oracle(width=16)}
    _, removed = subject.measured(run, {"oracle": modules}, keys={"oracle": "o"}, seed=0, resamples=20)
    assert removed[0].removed == pytest.approx((100, 100, 100)) and modules["image"].clean is None
    found = subject.outcomes("oracle", modules, key="o", adaptive=[run], handed=[("uncorrected", run, subject)])
    assert len(found) == 3 and all(torch.equal(ranks.tr, found["none", ""].tr) for ranks in found.values())
    assert modules["image"].clean is None, "what it was told is not kept"


REFUSED = [
    ("train_data={name: digits, split: test}", "calibration and test are both digits/test"),
    ("threat.eps=0", "there are no adversarial calibration pairs for the image projection"),
    ("sites=[image, text]", "there are no adversarial calibration pairs for the text projection"),
    ("sites=[tokens]", "fuses no image tokens"),
    ("calibration_images=99999", "calibration_images must be at most the 4800 images of train_data"),
    ("not_adaptive=[pdg]", "not_adaptive: 'pdg' is no label of attacks; did you mean 'pgd'"),
    ("only={square: [dynamo]}", "only.square: 'dynamo' is no correction; did you mean 'dynamic'"),
    ("corrections.x={kind: random_gate, of: mean}", "of must name a correction of kind gate, got 'mean'"),
    ("corrections.x={kind: subspace}", "a correction of kind subspace needs rank"),
    ("corrections.x={kind: mean, rank: 3}", "rank is no setting of a correction of kind mean"),
    ("corrections.x={kind: file, path: absent}", "corrections file absent does not exist"),
    ("attacks.u={name: universal}", "universal learns from other images first"),
    ("subset.pgd=9", "subset.pgd must be at most 8"),
    ("models={plain: {model: tiny}}", "each label of a model, and each seed, may stand once"),
]


@pytest.mark.parametrize(("told", "said"), REFUSED)
def test_refusals(fastmat: Fastmat, tmp_path: Path, told: str, said: str) -> None:  # noqa: F811
    quick = [] if told.startswith("models") else ["trained=null", "models={plain: {model: tiny}, mat: {model: tiny}}"]
    code, _, error = study(fastmat, tmp_path / "out", *quick, told)
    assert code == 2 and said in error and error.count("\n") == 1, error


def test_a_gate_for_another_width(fastmat: Fastmat, tmp_path: Path) -> None:  # noqa: F811
    write_corrections(tmp_path / "gate.safetensors", {"image": Gate(width=8)})
    given = f"corrections={{mine: {{kind: file, path: {tmp_path}/gate.safetensors}}}}"
    models = ["trained=null", "models={plain: {model: tiny}, mat: {model: tiny}}", "only={}"]
    code, _, error = study(fastmat, tmp_path / "out", *models, given)
    assert code == 2 and error.count("\n") == 1
    assert "gate.safetensors corrects 8 channels, but the model's image projection gives 16" in error


def test_rates_and_worst_by_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    txt2img = torch.arange(6).repeat_interleave(2)

    def ranks() -> Ranks:
        return Ranks(
            tr=torch.randint(15, (6,), generator=generator),
            ir=torch.randint(15, (12,), generator=generator),
            txt2img=txt2img,
        )

    clean, a, b, part = ranks(), ranks(), ranks(), ranks()
    part = Ranks(tr=part.tr[[1, 4]], ir=part.ir[[2, 3, 8, 9]], txt2img=torch.tensor([0, 0, 1, 1]))  # images 1 and 4
    values = []
    for i in range(6):
        for k in (1, 10):
            own = [float(clean.ir[t] < k) for t in range(12) if txt2img[t] == i]
            values.append((float(clean.tr[i] < k) + sum(own) / len(own)) / 2)
    found = {name: float(c.hits.sum() / c.queries.sum()) for name, c in rates(clean).items()}
    assert found["mean"] == pytest.approx(sum(values) / len(values))
    cells = {("none", ""): clean, ("a", "corrected"): a, ("b", "corrected"): b, ("part", "corrected"): part}
    images = {"a": range(6), "b": range(6), "part": (1, 4)}
    rows = {
        (row.correction, row.attack): row
        for row in rows_of(
            [{("m", "none"): cells, ("m", "mean"): cells}], images=images, partial=["part"], resamples=20
        )
    }
    worst = rates(worst_case([a, b]))["mean"]
    assert rows["mean", "worst"].values["mean"][0] == pytest.approx(100 * float(worst.hits.mean()))
    assert rows["mean", "worst"].change["mean"] == (0.0, 0.0, 0.0)
    own = [
        (sum(float(rank < k) for rank in ir) / 2 + float(tr < k)) / 2
        for tr, ir in (
            (
                max(a.tr[i], b.tr[i], part.tr[p]),
                [max(a.ir[t], b.ir[t], part.ir[t - 2 * i + 2 * p]) for t in (2 * i, 2 * i + 1)],
            )
            for p, i in enumerate((1, 4))
        )
        for k in (1, 10)
    ]
    assert rows["mean", "all"].n_images == 2
    assert rows["mean", "all"].values["mean"][0] == pytest.approx(100 * sum(own) / len(own))


Estimate = tuple[float, float, float]


def results_of(
    worst: dict[str, Estimate], whole: dict[str, Estimate], against: dict[str, Estimate]
) -> AlignmentResults:
    """One model; worst, whole: of the chosen static and the dynamic correction; against: dynamic minus static."""
    shared = {"model": "m", "n_images": 9, "values": {}}
    cells = [("worst", "", worst), ("none", "", worst), ("all", "", whole)]
    cells += [("pgd", "corrected", worst), ("pgd", "uncorrected", dict.fromkeys(worst, YES))]
    rows = [
        {**shared, "correction": label, "attack": attack, "made_on": made_on, "change": {"mean": value}}
        for attack, made_on, change in cells
        for label, value in change.items()
    ]
    layer = {
        "model": "m", "encoder": "image", "layer": "projection output", "attack": "pgd", "channels": 3,
        "explained_by_shift": (0.042, 0.03, 0.05), "explained_by_affine": 0.1, "mean_shift": 1, "wasserstein": 1,
        "uniformity_clean": 1, "uniformity_adversarial": 1, "rank_correlation": 1, "by_channel": [],
    }  # fmt: skip
    versus = [
        {"model": "m", "dynamic": "gate", "other": "const", "attack": attack, "made_on": "", "values": {"mean": value}}
        for attack, value in against.items()
    ]
    corrections = {"gate": {"kind": "gate"}, "const": {"kind": "constant_gate"}}
    return AlignmentResults.model_validate(
        {
            "study": "s", "answer": [], "dataset": "d", "n_images": 9, "n_captions": 9, "seeds": 1,
            "calibration": {"dataset": "d", "n_images": 3, "losses": {}}, "chosen": {"m": "const"}, "dynamic": "gate",
            "misalignment": [layer], "removed": [], "rows": rows, "versus": versus,
            "config": {"corrections": corrections, "sites": ["image"]}, "environment": {},
        }
    )  # fmt: skip


NO, YES, DOWN = (0.5, -0.5, 1.5), (5.0, 3.0, 7.0), (-3.0, -4.0, -2.0)
NONE = (0.0, -0.3, 0.3)
BOTH, ONE, WEAK = "It helps in 2 of 2 cases", "It helps in 1 of 2 cases", "against weaker attacks only"


@pytest.mark.parametrize(
    ("const", "gate", "whole", "against", "said"),
    [
        (NONE, NO, {}, {"worst": NO}, ["It does not help", "+0.5 points [-0.5, 1.5], gate on m", "Nor does it help"]),
        (DOWN, NO, {}, {"worst": NO}, ["It does not help", "it falls with const on m (-3.0"]),
        (NONE, YES, {}, {"worst": YES}, [ONE, "+5.0 points [3.0, 7.0] (gate on m)", "must depend"]),
        (YES, YES, {}, {"worst": NO}, [BOTH, "It need not depend on the input"]),
        (NONE, YES, {"const": NONE, "gate": YES}, {"worst": YES, "all": YES}, [ONE, "must depend"]),
        (
            NONE, YES, {"const": NONE, "gate": NO}, {"worst": YES, "all": NO},
            [WEAK, "(gate on m; of all attacks together: +0.5", "needs the input", "by +0.5"],
        ),
        (NONE, YES, {"const": NONE}, {"worst": YES}, [WEAK, "of all attacks together: not tried"]),
    ],
)  # fmt: skip
def test_the_answer_follows_the_numbers(
    const: Estimate, gate: Estimate, whole: dict[str, Estimate], against: dict[str, Estimate], said: list[str]
) -> None:
    sentences = answer(results_of({"const": const, "gate": gate}, whole, against))
    assert len(sentences) == 2 and all(sentence.count(". ") == 0 for sentence in sentences)
    for part in said:
        assert part in " ".join(sentences)
    assert "4.2 %" in sentences[0]
    assert "made without it, PGD would have shown +5.0" in sentences[1] and "made through it" in sentences[1]


def test_no_answer_without_the_question() -> None:
    assert answer(results_of({}, {}, {})) == []
