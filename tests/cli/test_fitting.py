"""An attack that is fitted first: on data that is not judged, once per surrogate and radius, resumed with its set."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmat.attacks.universal import Universal
from fastmat.attacks.universal_file import UniversalPerturbation
from fastmat.build import DATASETS, MODELS, build_data, build_model, build_threat, parse
from fastmat.data.loader import evaluation_batches
from fastmat.evaluation.results import read_results

Fastmat = Callable[..., tuple[int, str, str]]
UNIVERSAL = "{name: universal, epochs: 2, n_words: 5, n_captions: 4, scales: [0.5]}"
DIGITS = "fit_data={name: digits, split: val}"


@pytest.fixture
def words(settings: list[str]) -> list[str]:
    return [*settings, "threat.eps=12/255", DIGITS, "fit_limit=6"]


def contents(folder: Path) -> dict[str, bytes]:
    """All that a set says, without how long it took."""
    told = json.loads((folder / "manifest.json").read_text())
    shards = [{key: shard[key] for key in shard if key != "seconds"} for shard in told.pop("shards")]
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    return {**files, "manifest": json.dumps([told, shards]).encode()}


def test_an_attack_fits_and_keeps_the_fit_with_the_set(fastmat: Fastmat, words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "set"
    code, _, error = fastmat("attack", *words, "model=tiny", f"attack={UNIVERSAL}", "--out", out)
    assert code == 0, error
    kept = UniversalPerturbation.load(out / "fitted.safetensors")

    attack = Universal(threat=build_threat({"eps": 12 / 255}), epochs=2, n_words=5, n_captions=4, scales=(0.5,), seed=0)
    model = build_model(parse("tiny", MODELS, where="model"))
    data = build_data(parse({"name": "digits", "split": "val"}, DATASETS, where="data"), limit=6)
    attack.fit(model, evaluation_batches(data, model.image_transform, batch_size=4))
    assert attack.perturbation is not None
    assert torch.equal(kept.delta, attack.perturbation.delta) and kept.word == attack.perturbation.word
    stored = load_file(out / "images-00000.safetensors")
    assert float(stored["distance"].min()) > 0
    assert not any(file.name.startswith("fitted") for file in tmp_path.iterdir())

    # The file is what `perturbation` takes.
    again = f"attack={{name: universal, perturbation: {out / 'fitted.safetensors'}}}"
    assert fastmat("attack", *words, "model=tiny", again, "fit_data=null", "--out", tmp_path / "again")[0] == 0
    assert torch.equal(load_file(tmp_path / "again" / "images-00000.safetensors")["images"], stored["images"])


def test_a_killed_run_keeps_its_fit(
    fastmat: Fastmat, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Nothing is tidied up for it."""

    run = [*words, "model=tiny", f"attack={UNIVERSAL}", "shard_size=2", "batch_size=2"]
    assert fastmat("attack", *run, "--out", tmp_path / "whole")[0] == 0
    fits, runs = [], []
    fit, attack = Universal.fit, Universal.run

    def fitting(*values: object) -> None:
        fits.append(None)
        fit(*values)  # type: ignore[arg-type]

    def dying(*values: object) -> object:
        runs.append(None)
        if len(runs) == 2:
            raise Killed
        return attack(*values)  # type: ignore[arg-type]

    monkeypatch.setattr(Universal, "fit", fitting)
    monkeypatch.setattr(Universal, "run", dying)
    with pytest.raises(Killed):
        fastmat("attack", *run, "--out", tmp_path / "parts")
    changed = fastmat("attack", *run, "fit_limit=4", "--out", tmp_path / "parts", "--resume")
    assert changed[0] == 2 and "made with another configuration" in changed[2]
    assert fastmat("attack", *run, "--out", tmp_path / "parts", "--resume")[0] == 0
    assert len(fits) == 1
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_eval_fits_once_for_each_surrogate_and_radius(
    fastmat: Fastmat, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[int] = []
    fit = Universal.fit

    def fitting(attack: Universal, model: torch.nn.Module, batches: object) -> None:
        fits.append(round(attack.threat.eps * 255))
        fit(attack, model, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(Universal, "fit", fitting)
    run = [*words, f"attacks={{u: {UNIVERSAL}, pgd: {{name: pgd, steps: 1}}}}", "eps=[4/255]", "resamples=10"]
    run += ["victims.plain.model=tiny", "victims.other.model={name: tiny, seed: 1, image_size: 24}", "examples=0"]
    run += ["surrogates={a: tiny, b: {name: tiny, seed: 2}}", "keep_sets=true", "--out", tmp_path / "eval"]
    code, _, error = fastmat("eval", *run)
    assert code == 0, error
    assert fits == [12, 4, 12, 4]
    files = sorted((tmp_path / "eval" / "sets").glob("*/u-*/fitted.safetensors"))
    assert len({file.read_bytes() for file in files}) == len(files) == 4
    assert not list((tmp_path / "eval" / "sets").glob("*/pgd-*/fitted.safetensors"))
    before = read_results(tmp_path / "eval").rows
    assert fastmat("eval", *run, "--resume")[0] == 0
    assert len(fits) == 4
    assert fastmat("eval", *run, "fit_limit=5", "--resume")[0] == 0
    assert len(fits) == 8
    after = read_results(tmp_path / "eval").rows
    changed = {row.attack for row, old in zip(after, before, strict=True) if row.inputs != old.inputs}
    assert changed == {"u"}


def test_the_data_fitted_on_is_not_the_data_judged(
    fastmat: Fastmat, settings: list[str], words: list[str], tmp_path: Path
) -> None:
    same = settings[0].replace("data=", "fit_data=", 1)
    for command, run in (
        ("attack", ["model=tiny", f"attack={UNIVERSAL}"]),
        ("eval", ["victims.plain.model=tiny", f"attacks.u={UNIVERSAL}"]),
    ):
        out = tmp_path / command
        code, _, error = fastmat(command, *words, *run, same, "fit_limit=null", "--out", out)
        assert (code, error) == (
            2,
            "fastmat: fit_data: is the data that is judged; fit on other data, such as a training split\n",
        )
        where = "attack" if command == "attack" else "attacks.u"
        code, _, error = fastmat(command, *words, *run, "fit_data=null", "--out", out)
        assert code == 2 and error.count("\n") == 1
        assert error.startswith(f"fastmat: {where}: this attack is fitted before it attacks: set fit_data to data")
        code, _, error = fastmat(command, *words, *run, "fit_limit=100000", "--out", out)
        assert code == 2 and error.startswith("fastmat: fit_limit: digits/val has ")
        assert not out.exists()
    code, _, error = fastmat(
        "attack", *words, "model=tiny", f"attack={UNIVERSAL}", same, "fit_limit=4", "--out", tmp_path / "overlap"
    )
    assert code == 0
    assert "warning: fit_data: 4 of 6 images that are judged have ids of images fitted on" in error
