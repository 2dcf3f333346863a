"""Exit codes, help, and one sentence per mistake."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmat import build
from fastmat.cli import env
from fastmat.cli.main import COMMANDS

Fastmat = Callable[..., tuple[int, str, str]]


def test_every_command_has_help_with_its_keys(fastmat: Fastmat) -> None:
    keys = {
        "candidates": ["candidates: one of masked, ", "parity: 'correct' | 'official' = correct", "append_sep"],
        "attack": [
            f"attack: one of {', '.join(build.ATTACKS)} (required)",
            "threat.eps: float = 2/255",
            "shard_size: int = 256",
            "candidate_cache: Path or null = null",
            "fit_data: one of json, digits, image_folder, labelled_digits, torchvision = null",
        ],
        "pack": [
            "--images-per-shard N",
            "--index DIR",
            "data: one of json, digits, image_folder, labelled_digits, torchvision (required)",
        ],
        "augment": ["--with GENERATOR", "--report", "generator: one of eda", "lexicon: Path (required)"],
        "train": ["defence: one of finetune", "train.lr: float = 1e-05", "captions_per_image: int = 1"],
        "eval": ["victims.LABEL.model: one of open_clip", "eps: list of float", "resamples: int = 1000"],
        "task": [
            "task: one of grounding, captioning, entailment, zero_shot (required)",
            "refs: Path (required)",
            "DIR",
        ],
        "quickstart": ["choose_eps: list of float (required)", "harden.train.steps: int (required)"],
        "export": ["data: one of json, digits, image_folder", "SET"],
        "report": ["DIR"],
        "study": ["one of itc-weight", "fusion.rerank_k: int (required)", "weights: list of", "corruption"],
        "bench": ["--only NAME", "benchmarks/results/WHAT"],
        "env": ["versions"],
    }
    assert keys.keys() == COMMANDS.keys()
    for command, lines in keys.items():
        code, out, _ = fastmat(command, "--help")
        assert code == 0
        for line in lines:
            assert line in " ".join(out.split()), f"{command}: {line}"
        assert f"fastmat {command}" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_100_columns_and_explains_quirks_and_budgets(
    fastmat: Fastmat, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = fastmat(command, "--help")
    assert [line for line in out.splitlines() if len(line) > 100] == []
    if command in ("attack", "train", "eval", "quickstart"):
        assert "how many source words of a caption may be substituted" in out
        assert "published: 0: a word gets its left neighbour's candidates" in " ".join(out.split())
        assert "seed: int = the run's seed" in out


def test_attack_help_explains_each_attack(fastmat: Fastmat) -> None:
    _, out, _ = fastmat("attack", "--help")
    for name in (
        *build.ATTACKS,
        *build.MODELS,
        *build.DATASETS,
        *build.OBJECTIVES,
        *build.TEXT_SEARCHES,
        *build.CANDIDATES,
    ):
        assert f"\n  {name}\n" in out
    assert "antialias: bool = True" in out
    assert "candidates: one of masked, " in out and " (required)" not in next(
        line for line in out.splitlines() if "    candidates: one of" in line
    )
    assert "/255" not in next(line for line in out.splitlines() if line.startswith("    share: float"))
    assert "mlm: " in out
    assert "threat: ThreatModel" not in out


def test_bare_command_lists_the_commands(fastmat: Fastmat) -> None:
    code, out, _ = fastmat()
    assert code == 2
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["atack"], "fastmat: argument COMMAND: invalid choice: 'atack'"),
        (["attack", "--ot", "x"], "fastmat: the following arguments are required: --out; see fastmat attack --help"),
        (["attack", "a", "--out", "x"], "fastmat: 'a' must read key=value, such as attack.steps=20; a config is named"),
        (["attack", "--config", ".", "--out", "x"], "fastmat: config '.' is neither a file nor a shipped config"),
        (
            ["attack", "--config", "clip-vit-b16-flickr30k-atack", "--out", "x"],
            "fastmat: config 'clip-vit-b16-flickr30k-atack' is neither",
        ),
        (["train", "model=tiny", "--out", "x"], "fastmat: command line: data: this key is required; set it"),
        (["report", "nowhere"], "fastmat: nowhere is no folder"),
        (["quickstart", "choose_by=sgaa", "--out", "x"], "fastmat: 'sgaa', which chooses eps, is not one of pgd"),
        (["quickstart", "curve=[2]", "--out", "x"], "fastmat: curve: eps=2 looks like 8-bit pixel units"),
        (["quickstart", "--resume", "--out", "x"], "fastmat: --resume: x has no config.json to go on with"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(
    fastmat: Fastmat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, error = fastmat(*words)
    assert (code, out) == (2, "")
    assert error.startswith(sentence)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_speaks(fastmat: Fastmat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert fastmat("report", "nowhere") == (2, "", "")


def test_env_names_versions_and_devices(fastmat: Fastmat) -> None:
    code, out, _ = fastmat("env")
    shown = {line.split()[0] for line in out.splitlines()}
    assert code == 0
    assert {"python", "torch", "fastmat", "device", *env.LIBRARIES} <= shown


def test_warnings_of_libraries_are_silent_and_ours_are_one_line(
    fastmat: Fastmat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(arguments: object) -> None:
        warnings.warn("a library will change", FutureWarning)
        warnings.warn_explicit("a file is damaged", UserWarning, "fastmat/x.py", 1, module="fastmat.x")

    monkeypatch.setattr(env, "run", run)
    assert fastmat("env") == (0, "", "fastmat: warning: a file is damaged\n")


def test_listing_commands_does_not_wait_for_torch() -> None:
    code = "import sys, fastmat.cli.main as m; m.main([]); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "False"


def test_an_error_of_the_system_names_its_file(fastmat: Fastmat, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: object) -> None:
        raise PermissionError(13, "Permission denied", "secret.yaml")

    monkeypatch.setattr(env, "run", run)
    assert fastmat("env") == (2, "", "fastmat: secret.yaml: Permission denied; check the path and its permissions\n")
