"""`fastmat bench attacks`: the published loops do the published work, and nothing is reported of a wrong attack."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import pytest
import torch

from fastmat.attacks.draws import SeededDraws
from fastmat.benchmarks.attacks import bert_attack, co_attack, gate, meter, pgd, sa_aet, sga
from fastmat.benchmarks.attacks.gate import compare
from fastmat.benchmarks.attacks.job import Job, Outcome
from fastmat.benchmarks.attacks.meter import Meter, with_host_syncs
from fastmat.benchmarks.attacks.names import NAMES
from fastmat.benchmarks.attacks.peer import Peer
from fastmat.benchmarks.attacks.plot import write_plots
from fastmat.benchmarks.attacks.rows import AttackRow
from fastmat.benchmarks.attacks.setting import Choice, Setting, prepare
from fastmat.benchmarks.attacks.table import for_terminal, newest_runs, page
from fastmat.benchmarks.attacks.targets import TARGETS
from fastmat.benchmarks.harness import QualityError
from fastmat.benchmarks.rows import append_rows, read_rows_of
from fastmat.errors import UserError

IMAGES, CAPTIONS, STEPS, VIEWS = 2, 10, 10, 5


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    choice = Choice(model=None, mlm=None, data=None, images=IMAGES, short=True)
    return prepare(choice, tmp_path_factory.mktemp("setting"), torch.device("cpu"))


def metered(setting: Setting, job: Job, who: str) -> tuple[Outcome, Meter]:
    run, found = job.runner(setting, who, "float32", "both"), Meter()
    with found.watching((setting.model, setting.unfrozen), (setting.mlm.model, setting.unfrozen_bert)):
        return run(SeededDraws(0)), found


def text_pass(outcome: Outcome) -> int:
    """Encodings of one published pass over all captions: the original, L masked texts, T times c + 1 candidates."""
    trace = outcome.trace
    assert trace is not None
    assert len(trace.options) == sum(trace.tried)
    return CAPTIONS + sum(trace.words) + sum(trace.options)


def test_sga_as_published_does_the_published_work(setting: Setting) -> None:
    """Per batch 50 B forwards and backwards with weight gradients and two clean ones; two text passes and the encoding
    between them. The original's evaluation encodes every adversarial image and text once more."""
    outcome, found = metered(setting, sga.job(setting), "published")
    counts = found.counts
    first = metered_first_pass(setting)
    assert counts["image_forwards"] == (1 + STEPS * VIEWS + 1) * IMAGES
    assert counts["image_backwards"] == counts["with_weight_gradients"] == STEPS * VIEWS * IMAGES
    assert counts["text_encodings"] == first + text_pass(outcome) + CAPTIONS
    assert counts["mlm_calls"] >= 2
    assert found.seconds["mlm"] > 0 and found.seconds["text"] > 0 and found.seconds["image"] > 0
    assert sum(found.shares().values()) == pytest.approx(1)


def metered_first_pass(setting: Setting) -> int:
    """Text encodings of a pass that is guided by the clean images."""
    job = sga.job(setting)
    words = sga.Published(
        model=setting.unfrozen,
        bert=setting.unfrozen_bert,
        tokenizer=setting.tokenizer,
        length=sga.LENGTH,
        part="features",
        with_graph=True,
    )
    found = Meter()
    with torch.no_grad():
        guide = setting.model.encode_image(job.batch.images).features[job.batch.txt2img]
    with found.watching((setting.unfrozen,), ()):
        texts = words(job.batch.texts, guide)
    assert found.counts["text_encodings"] == text_pass(Outcome(job.batch.images, texts, words.trace))
    # One call for the originals, ceil(L / 32) for the masked and one for the candidates of every word tried.
    masked = sum(-(-length // 32) for length in words.trace.words)
    assert found.counts["text_calls"] == 1 + masked + sum(words.trace.tried)
    return found.counts["text_encodings"]


def test_co_attack_as_published_does_the_published_work(setting: Setting) -> None:
    """Every pair brings its own image: N + 1 forwards and N backwards each; two identical text passes."""
    outcome, found = metered(setting, co_attack.job(setting), "published")
    assert found.counts["image_forwards"] == (STEPS + 1) * CAPTIONS
    assert found.counts["image_backwards"] == found.counts["with_weight_gradients"] == STEPS * CAPTIONS
    assert found.counts["text_encodings"] == 2 * text_pass(outcome) + CAPTIONS


def test_sa_aet_as_published_does_the_published_work(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five views at first, then 9 times five trials of two passes and five views; as many decompositions."""
    decompositions = []
    plane = sa_aet.projector
    monkeypatch.setattr(sa_aet, "projector", lambda corpus: decompositions.append(1) or plane(corpus))
    job = sa_aet.job(setting)
    outcome, found = metered(setting, job, "published")
    assert len(decompositions) == 5 + 9 * 15 == 140
    assert found.counts["image_backwards"] == found.counts["with_weight_gradients"] == 140 * IMAGES
    assert found.counts["image_forwards"] == (140 + 3) * IMAGES
    tuned, _ = metered(setting, job, "tuned")
    assert compare(setting, job, "both", "float32", "tuned", tuned, outcome)["agreement"] == 1
    assert (tuned.images - job.batch.images).abs().max() <= sa_aet.EPS + 1e-6


def test_mixtures_of_sa_aet_are_in_order(setting: Setting) -> None:
    weights = sa_aet.mixture(SeededDraws(0), 1, setting.batch)
    assert weights.shape == (5, 3)
    assert torch.allclose(weights.sum(1), torch.ones(5))
    assert bool(((weights[:, 0] < weights[:, 2]) & (weights[:, 2] < weights[:, 1])).all())


def test_bert_attack_and_pgd_as_published_do_the_published_work(setting: Setting) -> None:
    outcome, found = metered(setting, bert_attack.job(setting), "published")
    assert found.counts["text_encodings"] == text_pass(outcome)
    assert found.counts["image_forwards"] == 0
    _, found = metered(setting, pgd.job(setting), "published")
    assert found.counts["image_forwards"] == found.counts["image_backwards"] == STEPS * IMAGES


@pytest.mark.parametrize("module", [pgd, bert_attack, sga, co_attack])
def test_tuned_loops_do_without_weight_gradients_and_find_the_same(setting: Setting, module: object) -> None:
    job: Job = module.job(setting)  # type: ignore[attr-defined]
    published = job.runner(setting, "published", "float32", "both")(SeededDraws(0))
    outcome, found = metered(setting, job, "tuned")
    assert found.counts["with_weight_gradients"] == 0
    assert compare(setting, job, "both", "float32", "tuned", outcome, published)["agreement"] == 1
    ours, counted = metered(setting, job, "fastmat")
    assert compare(setting, job, "both", "float32", "fastmat", ours, published)["agreement"] == 1
    assert counted.counts["text_encodings"] <= found.counts["text_encodings"]


@pytest.mark.parametrize("module", [sga, co_attack])
def test_text_and_image_part_stand_alone(setting: Setting, module: object) -> None:
    job: Job = module.job(setting)  # type: ignore[attr-defined]
    for half in ("text", "image"):
        published = job.runner(setting, "published", "float32", half)(SeededDraws(0))
        assert torch.equal(published.images, job.batch.images) == (half == "text")
        assert (tuple(published.texts) == job.batch.texts) == (half == "image")
        for who in ("tuned", "fastmat"):
            got = job.runner(setting, who, "float32", half)(SeededDraws(0))
            assert compare(setting, job, half, "float32", who, got, published)["agreement"] == 1


def test_the_gate_refuses_other_texts_images_and_nan(setting: Setting) -> None:
    job = sga.job(setting)
    good = job.runner(setting, "published", "float32", "both")(SeededDraws(0))
    clear = dataclasses.replace(good.trace, margin=[1.0] * CAPTIONS, order=[1.0] * CAPTIONS)
    good = good._replace(trace=clear)
    other = good._replace(texts=["a word", *good.texts[1:]])
    with pytest.raises(QualityError, match=r"sga \(both\), ours float32: 1 texts differ .* it is not timed"):
        compare(setting, job, "both", "float32", "ours", other, good)
    compare(setting, job, "both", "bfloat16", "ours", other, good)
    unclear = good._replace(trace=dataclasses.replace(clear, margin=[0.0, *clear.margin[1:]]))
    assert compare(setting, job, "both", "float32", "ours", other, unclear)["unclear"] == 1
    many = good._replace(texts=["a word", "a word", *good.texts[2:]])
    with pytest.raises(QualityError, match=r"only 80.0% of the texts agree with fp32"):
        compare(setting, job, "both", "bfloat16", "ours", many, good)
    with pytest.raises(QualityError, match="NaN"):
        compare(setting, job, "both", "bfloat16", "ours", good._replace(images=good.images * torch.nan), good)


@pytest.mark.parametrize(
    ("dtype", "objectives", "fooled", "sentence"),
    [
        ("bfloat16", (1.0, 1.0), (103, 100), "success rate differs by 0.8 points"),
        ("bfloat16", (1.0, 1.0), (102, 100), None),
        ("float32", (98.0, 100.0), (100, 100), "final objective is 2.0% off"),
        ("float32", (99.5, 100.0), (100, 100), None),
    ],
)
def test_objectives_and_success_rates_that_move_are_refused(
    setting: Setting,
    monkeypatch: pytest.MonkeyPatch,
    dtype: Literal["float32", "bfloat16"],
    objectives: tuple[float, float],
    fooled: tuple[int, int],
    sentence: str | None,
) -> None:
    job = sga.job(setting)
    judged = [
        gate.Judged(torch.full((2,), value), torch.ones(10, 2), 400, count)
        for value, count in zip(objectives, fooled, strict=True)
    ]
    monkeypatch.setattr(gate, "judge", lambda *_: judged.pop(0))
    outcome = Outcome(job.batch.images, job.batch.texts)
    with nullcontext() if sentence is None else pytest.raises(QualityError, match=sentence):
        compare(setting, job, "both", dtype, "ours", outcome, outcome)


def test_the_objective_may_be_off_by_what_rounding_scatters() -> None:
    clean, theirs = torch.zeros(4), torch.full((4,), 10.0)
    off, error = gate.objective_off(theirs + torch.tensor([1.0, -1.0, 1.0, -0.2]), theirs, clean)
    assert off == pytest.approx(0.02)
    assert error == pytest.approx(float(torch.tensor([1.0, -1.0, 1.0, -0.2]).std()) / 2 / 10)
    assert gate.objective_off(theirs + 1, theirs, clean) == (pytest.approx(0.1), 0)


def test_reads_of_tensors_are_counted() -> None:
    x = torch.arange(4.0)
    cases = [(lambda: x + 1, 0), (lambda: x.sum().item(), 1), (lambda: bool(x[0] > 0), 1), (lambda: x.tolist(), 1)]
    cases += [(lambda: x.nonzero(), 1), (lambda: [int(v) for v in x], 4), (lambda: x.cpu().numpy(), 2)]
    for call, expected in cases:
        assert with_host_syncs(call, torch.device("cpu"))[1] == expected


def test_a_meter_leaves_nothing_behind(setting: Setting) -> None:
    grad = torch.autograd.grad
    _, found = metered(setting, pgd.job(setting), "tuned")
    assert torch.autograd.grad is grad
    assert not setting.model.image_tower._forward_hooks and not setting.model.text_projection._forward_pre_hooks
    before = dict(found.counts)
    setting.model.encode_image(pgd.job(setting).batch.images)
    assert dict(found.counts) == before
    assert set(found.seconds) == set(meter.PARTS)


ROW = AttackRow(
    time="2026-01-01T00:00:00+00:00",
    attack="sga",
    half="both",
    setting={"model": "ViT-B-16", "side": 224, "images": 2},
    pairs=10,
    dtype="float32",
    implementation="fastmat",
    kind="fastmat",
    rounds=3,
    p20=900,
    p50=1000,
    p80=1100,
    counts={"text_encodings": 190, "image_forwards": 104, "image_backwards": 100},
    syncs=50,
    shares={"mlm": 0.1, "text": 0.2, "image": 0.6, "other": 0.1},
    peak=2_000_000,
    quality={"agreement": 1.0, "asr": 50.0},
    device="cpu",
    machine="A CPU",
    threads=1,
    versions={"torch": "2.15.0"},
    commit="abc1234",
    command="fastmat bench attacks",
)
PUBLISHED = dataclasses.replace(ROW, implementation="published", kind="published", p50=2000.0)


def test_rows_come_back_and_make_table_targets_and_plot(tmp_path: Path) -> None:
    append_rows(tmp_path / "rows.jsonl", [ROW, PUBLISHED])
    rows = read_rows_of(AttackRow, tmp_path / "rows.jsonl")
    assert rows == [ROW, PUBLISHED]
    text = for_terminal(newest_runs(rows))
    assert "at least 3 times the speed of published  2.00      no: 60% of our time is the image encoder, on 100" in text
    assert "10/20/60/10" in text
    assert "19.0" in text  # texts per caption
    faster = dataclasses.replace(ROW, p50=500.0)
    assert "at least 3 times the speed of published | 4.00 | yes |" in page([faster, PUBLISHED], [])
    assert page([], []).count("| - | - |") == len(TARGETS)
    assert write_plots(tmp_path, rows) == ["speed-cpu-1-thread-vit-b-16-at-224-px-2-images.svg"]
    later = dataclasses.replace(ROW, time="2026-02-01T00:00:00+00:00")
    assert newest_runs([ROW, PUBLISHED, later]) == [(later,)]


def test_targets_name_attacks_of_the_suite() -> None:
    attacks = {target.attack.split(" ")[0] for target in TARGETS}
    assert attacks - {"sa_aet"} <= set(NAMES)


FAKE = """
class PGD:
    def __init__(self, model, eps, alpha, steps):
        self.model = model
    def __call__(self, images, labels):
        print("chatter of the original")
        return images + 0 * self.model(images).sum()
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """Something that looks like torchattacks to the driver."""
    (tmp_path / "torchattacks/attacks").mkdir(parents=True)
    (tmp_path / "torchattacks/attacks/pgd.py").touch()
    (tmp_path / "torchattacks/__init__.py").write_text(FAKE)
    return tmp_path


def test_a_peer_answers_rounds_from_its_own_process(setting: Setting, checkout: Path, tmp_path: Path) -> None:
    with Peer(checkout=checkout, python=sys.executable, setting=setting, folder=tmp_path / "job") as peer:
        assert (peer.attacks, peer.name) == ("pgd", "torchattacks")
        assert torch.__version__.startswith(peer.versions["torch"])
        assert peer.round() > 0
        assert tuple(peer.texts()) == pgd.job(setting).batch.texts
    assert peer.process.returncode == 0


def test_a_peer_that_is_none_or_fails_is_one_sentence(setting: Setting, checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has none of torchattacks"):
        Peer(checkout=tmp_path / "job", python=sys.executable, setting=setting, folder=tmp_path / "job")
    with pytest.raises(UserError, match=r"--peer-python nowhere: No such file"):
        Peer(checkout=checkout, python="nowhere", setting=setting, folder=tmp_path / "job")
    for say, sentence in (
        ('{"error": "ImportError: no torch"}', r"torchattacks does not run there \(ImportError: no torch\)"),
        ("nothing that is JSON", "torchattacks ended with status 3"),
    ):
        other = tmp_path / "python"
        other.write_text(f"#!/bin/sh\necho '{say}'\nexit 3\n")
        other.chmod(0o755)
        with pytest.raises(UserError, match=sentence):
            Peer(checkout=checkout, python=str(other), setting=setting, folder=tmp_path / "job")


def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    choice = Choice(model="ViT-B-61", mlm=None, data=None, images=2, short=True)
    with pytest.raises(UserError, match=r"--model ViT-B-61 is neither a folder nor a model of open_clip; did you mean"):
        prepare(choice, tmp_path, torch.device("cpu"))
