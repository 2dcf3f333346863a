"""The quickstart with next to no training: stages run once, finished ones are kept, validation chooses eps."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmat.cli import quickstart
from fastmat.cli.config import EvalConfig, QuickstartConfig
from fastmat.cli.load import load_config
from fastmat.evaluation.results import Results, Row, Threat, read_results
from fastmat.training import interrupt

Fastmat = Callable[..., tuple[int, str, str]]
TINY = [
    "mlm_steps=2", "batch_size=8", "pretrain.steps=2", "pretrain.warmup_steps=0", "harden.train.steps=1",
    "harden.train.warmup_steps=0", "harden.defences.tecoa_itr.steps=1", "model.widths=[8, 8, 8, 8]",
    "validation_images=6", "test_images=6", "choose_eps=[4/255, 8/255]", "attacks.pgd.steps=1", "attacks.sga.steps=1",
    "examples=1", "curve=[1/255]",
]  # fmt: skip


def test_every_stage_and_going_on(fastmat: Fastmat, tmp_path: Path) -> None:
    out = tmp_path / "quick"
    code, shown, _ = fastmat("quickstart", *TINY, "--out", out)
    assert code == 0
    assert "/255, chosen on the validation split" in shown
    results = read_results(out)
    seen = {(row.defence, row.attack) for row in results.rows}
    assert seen == {(d, a) for d in ("finetune", "tecoa_itr", "mat") for a in ("none", "pgd", "bert_attack", "sga")}
    assert {row.split for row in results.rows} == {"test"}
    assert {row.split for row in read_results(out / "validation").rows} == {"val"}
    chosen = {row.threat.eps for row in results.rows if row.attack != "none"} - {1 / 255}
    assert chosen in ({4 / 255}, {8 / 255})
    assert results.training.keys() == {"finetune", "tecoa_itr", "mat"}
    assert results.config["quickstart"]["mlm_steps"] == 2
    steps = {json.loads((out / label / "log.jsonl").read_text().splitlines()[-1])["step"] for label in results.training}
    assert steps == {1}

    kept = (out / "tecoa_itr" / "model.safetensors").stat().st_mtime_ns
    before = {label: (out / label / "model.safetensors").read_bytes() for label in ("tecoa_itr", "mat")}
    (out / "mat" / "model.safetensors").unlink()
    (out / "results.json").unlink()
    assert fastmat("quickstart", *TINY, "--out", out)[0] == 2
    assert fastmat("quickstart", *TINY, "seed=1", "--out", out, "--resume")[0] == 2
    assert fastmat("quickstart", *TINY, "--out", out, "--resume")[0] == 0
    assert (out / "tecoa_itr" / "model.safetensors").stat().st_mtime_ns == kept
    assert (out / "mat" / "model.safetensors").read_bytes() == before["mat"]
    timing = {"seconds", "pairs_per_s"}
    again = read_results(out)
    assert [r.model_dump(exclude=timing) for r in again.rows] == [r.model_dump(exclude=timing) for r in results.rows]


@pytest.mark.parametrize(
    ("tr_at_1", "expected"),
    [((80.0, 9.0, 2.0), 2), ((10.0, 9.0, 2.0), 1), ((80.0, 30.0, 20.0), 4)],
)
def test_eps_is_the_first_that_breaks_on_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tr_at_1: tuple[float, ...], expected: int
) -> None:
    config = load_config(
        QuickstartConfig, "quickstart", ["choose_eps=[1/255, 2/255, 4/255]", "broken_below=10", "choose_by=sga"]
    )
    asked: list[EvalConfig] = []

    def evaluated(wanted: EvalConfig, out: Path, *, resume: bool) -> Results:
        asked.append(wanted)
        radii = (1 / 255, *wanted.eps)
        rows = [row_of("none", 0.0, 90.0), *(row_of("sga", eps, v) for eps, v in zip(radii, tr_at_1, strict=True))]
        return Results(rows=rows, config={}, environment={})

    monkeypatch.setattr(quickstart, "evaluate_models", evaluated)
    assert quickstart.Quickstart(config, tmp_path).choose_eps({"name": "tiny"}) == expected / 255
    (wanted,) = asked
    assert wanted.data.arguments["split"] == "val"
    assert (list(wanted.victims), list(wanted.attacks)) == (["finetune"], ["sga"])


def row_of(attack: str, eps: float, tr_at_1: float) -> Row:
    rates = {f"{kind}@{k}": tr_at_1 for kind in ("tr", "ir", "asr_tr", "asr_ir") for k in (1, 5, 10)}
    setting = {"surrogate": "f", "victim": "f", "defence": "finetune", "dataset": "digits", "split": "val", "seed": 0}
    counts = {"n_images": 6, "n_captions": 30, "max_words_changed": 1}
    measured = {"ci": {}, "max_distance": eps, "seconds": 1.0, "pairs_per_s": 1.0}
    return Row.model_validate({**setting, "attack": attack, "threat": Threat(eps=eps), **rates, **counts, **measured})


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stop_says_how_to_go_on(
    fastmat: Fastmat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, code: int
) -> None:
    def stopped(self: quickstart.Quickstart) -> None:
        raise interrupt.Interrupted(tmp_path / "checkpoint", sent)

    monkeypatch.setattr(quickstart.Quickstart, "run", stopped)
    got, shown, error = fastmat("quickstart", *TINY, "--out", tmp_path / "quick")
    assert got == code and "the same command with --resume goes on" in shown + error
