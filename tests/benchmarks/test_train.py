"""`fastmat bench train`: the published loops do the published work, and nothing is reported of another step."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from fastmat.attacks.draws import SeededDraws
from fastmat.benchmarks.attacks.meter import with_host_syncs
from fastmat.benchmarks.attacks.setting import Choice, Setting, prepare
from fastmat.benchmarks.attacks.table import newest_runs
from fastmat.benchmarks.harness import QualityError
from fastmat.benchmarks.rows import append_rows
from fastmat.benchmarks.scaling.shapes import CLIP_B16
from fastmat.benchmarks.scaling.work import Texts
from fastmat.benchmarks.train import command, fare, suite, tecoa
from fastmat.benchmarks.train.floor import floor_flops, product_rate, shape_of
from fastmat.benchmarks.train.gate import Seen, compare, gradient_off, gradients_of, see
from fastmat.benchmarks.train.job import Contestant, Job
from fastmat.benchmarks.train.meter import PARTS, Split, StepMeter
from fastmat.benchmarks.train.names import NAMES
from fastmat.benchmarks.train.pairs import Pairs
from fastmat.benchmarks.train.plot import write_plots
from fastmat.benchmarks.train.rows import TrainRow
from fastmat.benchmarks.train.suite import admitted, job_of
from fastmat.benchmarks.train.table import for_terminal, page
from fastmat.benchmarks.train.targets import TARGETS

B = 2
CHOICE = Choice(model=None, mlm=None, data=None, images=B, short=True)
CPU = torch.device("cpu")
JobOf = Callable[[str], Job]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return prepare(CHOICE, tmp_path_factory.mktemp("setting"), CPU)


@pytest.fixture(scope="module")
def pairs(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(CHOICE, setting.model, tmp_path_factory.mktemp("images"), CPU)


@pytest.fixture(scope="module")
def job(setting: Setting, pairs: Pairs) -> JobOf:
    jobs = {name: job_of(name, setting, Split(CPU), pairs) for name in NAMES}
    return jobs.__getitem__


def one_of(job: Job, kind: str, dtype: str = "float32") -> Contestant:
    return next(who for who in job.contestants if (who.kind, who.dtype) == (kind, dtype))


def seen(job: Job, who: Contestant, *, gated: bool = True) -> Seen:
    with gradients_of(who.model, who.optimizer) as gradients:
        step = who.gated if gated and who.gated is not None else who.step
        stepped = step(job.batch(0), SeededDraws(0))
    who.model.zero_grad()
    return see(job, stepped, gradients)


def counted(setting: Setting, job: Job, kind: str) -> StepMeter:
    meter, who = StepMeter(), one_of(job, kind)
    with meter.watching((who.model, *who.watched), (setting.mlm.model, setting.unfrozen_bert)):
        who.step(job.batch(0), SeededDraws(0))
    who.model.zero_grad()
    return meter


def test_the_plain_mat_loop_goes_caption_by_caption_and_through_all_weights(setting: Setting, job: JobOf) -> None:
    """Clean, two attacked and the outer image forward; three backwards, all of them to the weights."""
    mat = job("mat")
    found = counted(setting, mat, "published").counts
    assert found["image_forwards"] == 4 * B
    assert found["image_backwards"] == found["with_weight_gradients"] == 3 * B
    trace = seen(mat, one_of(mat, "published")).stepped.trace
    assert trace is not None
    search = B + sum(trace.words) + sum(trace.options)
    assert found["text_encodings"] == search + 2 * B  # what was chosen, for the image attack and for the outer step
    assert found["text_calls"] == 1 + sum(-(-n // 32) for n in trace.words) + sum(trace.tried) + 2
    assert found["text_backwards"] == B
    ours = counted(setting, mat, "fastmat").counts
    assert ours["image_forwards"] == 4 * B
    assert ours["with_weight_gradients"] == B
    assert ours["text_encodings"] < found["text_encodings"] - sum(trace.words) / 4
    plain = counted(setting, mat, "finetune").counts
    assert (plain["image_forwards"], plain["text_encodings"], plain["mlm_calls"]) == (B, B, 0)


def test_fare_as_published_wastes_a_forward_and_waits(setting: Setting, job: JobOf) -> None:
    """25 f of performance notes: teacher 1, attack 10 and 10, clean 1 with a graph that nobody uses, outer 3."""
    of = job("fare")
    found = counted(setting, of, "published").counts
    assert found["image_forwards"] == (1 + 10 + 1 + 1) * B
    assert found["with_weight_gradients"] == (10 + 1 + 1) * B
    assert found["image_backwards"] == (10 + 1) * B
    ours = counted(setting, of, "fastmat").counts
    assert ours["image_forwards"] == (1 + 10 + 1) * B
    assert ours["with_weight_gradients"] == B
    waits = {}
    for kind in ("published", "tuned"):
        who = one_of(of, kind)
        _, waits[kind] = with_host_syncs(lambda who=who: who.step(of.batch(0), SeededDraws(0)), CPU)
        who.model.zero_grad()
    updated = len(one_of(of, "published").optimizer.param_groups[0]["params"])  # a count of steps each, not fused
    assert waits["published"] - waits["tuned"] == 4 * fare.STEPS + 2 + 6 + updated  # checks, the first one, values read


def test_the_momentum_of_fare_is_off_in_the_gate_alone(job: JobOf) -> None:
    of = job("fare")
    who = one_of(of, "published")
    timed, gated = (seen(of, who, gated=gated).stepped.images for gated in (False, True))
    x0 = of.batch(0).images
    assert not torch.equal(timed, gated)
    assert (timed - x0).abs().max() <= fare.EPS + 1e-6
    plain = seen(of, one_of(of, "tuned")).stepped.images
    assert ((gated - plain).abs() < 1e-6).float().mean() > 0.999 > ((timed - plain).abs() < 1e-6).float().mean()


def test_tecoa_as_published_encodes_all_prompts_in_every_forward(setting: Setting, job: JobOf) -> None:
    of = job("tecoa")
    classes, forwards = 20, tecoa.STEPS + 1
    found = counted(setting, of, "published").counts
    assert found["text_encodings"] == found["text_backwards"] == forwards * classes
    assert found["image_forwards"] == found["with_weight_gradients"] == forwards * B
    seen(of, one_of(of, "fastmat"))
    ours = counted(setting, of, "fastmat").counts
    assert ours["text_encodings"] == 0
    assert (ours["image_forwards"], ours["with_weight_gradients"]) == (forwards * B, B)


def test_gradients_of_the_published_attack_leak_into_the_update(
    setting: Setting, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the scaler's factor the whole of them; they are those of the weights at both attacked images."""
    monkeypatch.setattr(tecoa, "SCALE", 1.0)
    of = tecoa.job(setting, Split(CPU), pairs)
    leaked, clean = seen(of, one_of(of, "published")).gradients, seen(of, one_of(of, "tuned")).gradients
    assert gradient_off(leaked, clean) > 0.5
    model, batch = setting.unfrozen, of.batch(0)
    tokens = model.tokenize(of.batch.prompts, pad=True)  # type: ignore[attr-defined]
    labels = of.batch.labels(batch)  # type: ignore[attr-defined]
    x0 = batch.images
    x = (x0 + tecoa.EPS * SeededDraws(0).uniform("start", batch.index, x0.shape[1:])).clamp(0, 1)
    expected = {name: value.clone() for name, value in clean.items()}
    for _ in range(tecoa.STEPS):
        x.requires_grad_()
        texts = model.logit_scale * model.encode_text(tokens).features
        loss = F.cross_entropy(model.encode_image(x).features @ texts.T, labels)
        weights = [p for name, p in model.named_parameters() if name in expected]
        gradient, *of_weights = torch.autograd.grad(loss, [x, *weights])
        names = [name for name, _ in model.named_parameters() if name in expected]
        for name, value in zip(names, of_weights, strict=True):
            expected[name] += value
        x = (x0 + (x.detach() + tecoa.STEP * gradient.sign() - x0).clamp(-tecoa.EPS, tecoa.EPS)).clamp(0, 1)
    assert gradient_off(leaked, expected) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_all_take_the_same_step(setting: Setting, job: JobOf, name: str) -> None:
    of = job(name)
    measured, refused = admitted(of, setting)
    assert all("bfloat16" in str(error) for error in refused)  # two images and random weights: 16 bits may differ
    exact = [one for one in measured if one.who.dtype == "float32"]
    assert [one.who for one in exact] == [who for who in of.contestants if who.dtype == "float32"]
    assert {one.quality["agreement"] for one in exact} == {1.0}
    assert all(one.quality["gradient_off"] < 1e-3 and one.quality["pixels"] > 0.999 for one in exact)


def test_the_weights_stay_and_no_gradient_is_left(setting: Setting, job: JobOf) -> None:
    of = job("mat")
    ours = one_of(of, "fastmat").model
    for one, other in ((ours, setting.model), (setting.unfrozen, setting.model)):
        same = zip(one.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) and a.grad is None for a, b in same)


def test_the_gate_refuses_another_step(job: JobOf) -> None:
    of = job("mat")
    who, low = one_of(of, "fastmat"), one_of(of, "fastmat", "bfloat16")
    good = seen(of, one_of(of, "published"))
    trace = dataclasses.replace(good.stepped.trace, margin=[1.0] * B, order=[1.0] * B)  # type: ignore[type-var]
    good = good._replace(stepped=good.stepped._replace(trace=trace), values=torch.full((B,), 2.0))
    clean = torch.ones(B)

    def refused(who: Contestant, sentence: str, **changes: object) -> None:
        changed = {key: value for key, value in changes.items() if key in Seen._fields}
        rest = {key: value for key, value in changes.items() if key not in Seen._fields}
        with pytest.raises(QualityError, match=sentence):
            got = good._replace(stepped=good.stepped._replace(**rest), **changed)
            compare(who, got, good, clean=clean, title="mat")

    stepped = good.stepped
    refused(who, r"mat, fastmat float32: 1 texts differ .* it is not timed", texts=("a word", *stepped.texts[1:]))
    refused(low, "only 0.0% of the texts agree", texts=("a word", "another"))
    refused(who, r"has a loss that is 2\.0% off, of which 0\.0% may be chance", values=1.02 * good.values)
    nothing = {name: torch.zeros_like(value) for name, value in good.gradients.items()}
    refused(who, "the gradient is 100.00% off", gradients=nothing)
    refused(who, "the gradient is inf% off", gradients={})
    refused(low, r"has a loss that is 10\.0% off, of which 0\.0% may be chance", values=1.1 * good.values)
    for each in (who, low):
        refused(each, "off", values=good.values * torch.nan)
        refused(each, "the loss is nan% off", loss=stepped.loss * torch.nan)
        refused(each, "the gradient is nan% off", gradients={k: v * torch.nan for k, v in good.gradients.items()})
    with pytest.raises(QualityError, match=r"the loss is 2\.00% off"):
        worse = good.stepped._replace(loss=1.02 * good.stepped.loss)
        compare(who, good._replace(stepped=worse), good, clean=clean, title="mat")
    one_text = good.stepped._replace(texts=("a word", *stepped.texts[1:]))
    assert compare(low, good._replace(stepped=one_text), good, clean=clean, title="mat")["agreement"] == 0.5


def test_a_defence_that_forgets_the_attack_is_refused(setting: Setting, job: JobOf) -> None:
    """Fine-tuning in MAT's place: other texts, other images."""
    of = job("mat")
    wrong = dataclasses.replace(one_of(of, "finetune"), like="published")
    bad = dataclasses.replace(of, contestants=(of.contestants[0], wrong))
    with pytest.raises(QualityError, match="mat, finetune float32"):
        admitted(bad, setting)


def test_the_split_charges_the_innermost_part_and_is_off_otherwise() -> None:
    split = Split(CPU)
    with split("image"):
        pass
    with split.watching() as seconds:
        with split("image"):
            time.sleep(0.02)
            split.timed(lambda: time.sleep(0.05), "text")()
        with split("outer"):
            time.sleep(0.01)
    assert split.seconds is None
    assert tuple(seconds) == PARTS
    assert seconds["text"] >= 0.05 and seconds["image"] >= 0.02 and seconds["outer"] >= 0.01 and not seconds["loading"]


def test_the_floor_knows_the_shape_of_the_model(tmp_path: Path) -> None:
    def folder(name: str) -> Path:
        config = {"model_cfg": open_clip.get_model_config(name)}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        return tmp_path

    shape = shape_of(folder("ViT-B-16"))
    assert shape is not None
    assert (shape.image.flops, shape.text.flops) == (CLIP_B16.image.flops, CLIP_B16.text.flops)
    forward = shape.image.flops.forward
    assert forward == pytest.approx(35.1e9, rel=0.01)
    assert floor_flops(shape, "tecoa", Texts(), batch=10) == pytest.approx(10 * 7 * forward, rel=0.05)
    assert floor_flops(shape, "fare", Texts(), batch=10) == pytest.approx(10 * 24 * forward, rel=0.05)
    # 35.4 TFLOP of the performance notes at 128 pairs, and the clean forward that guides the text attack
    assert floor_flops(shape, "mat", Texts(), batch=128) == pytest.approx(35.4e12 + 128 * forward, rel=0.05)
    assert shape_of(folder("RN50")) is None
    assert shape_of(folder("roberta-ViT-B-32")) is None
    assert product_rate(CPU, torch.float32, seconds=0) > 1e8


ROW = TrainRow(
    time="2026-01-01T00:00:00+00:00",
    attack="mat",
    half="both",
    setting={"model": "ViT-B-16", "side": 224, "images": 8},
    pairs=8,
    dtype="float32",
    implementation="fastmat",
    kind="fastmat",
    rounds=3,
    p20=900,
    p50=1000,
    p80=1100,
    counts={"text_encodings": 80, "text_backwards": 8, "image_forwards": 32, "image_backwards": 24},
    syncs=50,
    shares={"text": 0.2, "image": 0.5, "outer": 0.28, "loading": 0.02},
    peak=2_000_000,
    quality={"agreement": 1.0, "loss_off": 0.0, "gradient_off": 0.01},
    device="cpu",
    machine="A CPU",
    threads=1,
    versions={"torch": "2.15.0"},
    commit="abc1234",
    command="fastmat bench train",
    floor=400.0,
)


def test_rows_come_back_and_make_table_targets_and_plot(tmp_path: Path) -> None:
    published = dataclasses.replace(ROW, kind="published", p50=2000.0)
    finetune = dataclasses.replace(ROW, kind="finetune", p50=400.0, floor=None)
    append_rows(tmp_path / "rows.jsonl", [ROW, published, finetune])
    rows = command.known_rows(tmp_path / "rows.jsonl")
    assert rows == [ROW, published, finetune]
    text = for_terminal(newest_runs(rows))
    missed = (
        "at least 3 times the speed of published  2.00      no: 50% of our time is the image attack, 40% of our time"
    )
    assert missed in text
    assert "times the time of fine-tuning: reported  2.50      reported" in text
    assert "20/50/28/2" in text
    faster = dataclasses.replace(ROW, p50=500.0)
    assert "at least 3 times the speed of published | 4.00 | yes |" in page([faster, published], [])
    assert page([], []).count("| - | - |") == len(TARGETS)
    assert write_plots(tmp_path, rows) == ["split-cpu-1-thread-vit-b-16-at-224-px-8-images.svg"]
    half = dataclasses.replace(published, dtype="float16", p50=700.0)
    target = next(target for target in TARGETS if (target.device, target.opponent) == ("cpu", "published"))
    assert target.measured([ROW, published, half]) == 0.7
    assert {target.attack for target in TARGETS} == set(NAMES)


def test_a_short_run_from_command_to_page(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "prepare", lambda *_: setting)
    told: list[str] = []
    refused: list[QualityError] = []
    rows_file = tmp_path / "rows.jsonl"
    command.measure_steps(("fare",), CHOICE, CPU, rows_file, command="c", tell=told.append, refused=refused)
    assert told == ["fare", *map(str, refused)]
    rows = command.known_rows(rows_file)
    exact = [row.kind for row in rows if row.dtype == "float32"]
    assert (exact, len(rows)) == (["published", "tuned", "fastmat"], 5 - len(refused))
    for row in rows:
        assert sum(row.shares.values()) == pytest.approx(1)
        assert row.utilisation is not None and row.rounds == 1 and row.syncs
    command.show(tmp_path, 0)
    assert "at least 1.1 times the speed of published" in capsys.readouterr().out
    names = {"README.md", "rows.jsonl", "split-cpu-1-thread-built-in-at-32-px-2-images.svg"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_step_that_fails_its_gate_has_no_row(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "prepare", lambda *_: setting)

    def refuse(*_: object, **__: object) -> None:
        raise QualityError("fare, tuned float32: other")

    monkeypatch.setattr(suite, "compare", refuse)
    refused: list[QualityError] = []
    rows_file = tmp_path / "rows.jsonl"
    command.measure_steps(("fare",), CHOICE, CPU, rows_file, command="c", tell=lambda _: None, refused=refused)
    assert [str(error) for error in refused] == ["fare, tuned float32: other"]
    assert not rows_file.exists()
