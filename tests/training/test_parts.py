"""Schedule, settings, parameter selection, modes, checkpoints."""

import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training.synthetic import model_with_state

from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.training import checkpoint
from fastmat.training.parameters import clamp_logit_scale, decay_groups, trained_parameters, training_mode
from fastmat.training.schedule import cosine_with_warmup
from fastmat.training.settings import TrainSettings


def test_schedule_warms_up_linearly_then_falls_as_a_half_cosine():
    shares = [cosine_with_warmup(s, steps=20, warmup_steps=4) for s in range(20)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4] == 1.0 and shares[12] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(shares[4:])) and shares[-1] > 0
    assert cosine_with_warmup(0, steps=1, warmup_steps=0) == 1.0
    assert cosine_with_warmup(1, steps=2, warmup_steps=2) == 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": -1}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"warmup_steps": 11}, "warmup_steps must lie"),
        ({"clip_norm": 0}, "clip_norm"),
        ({"precision": "fp16"}, "'no' or 'bf16', got 'fp16'"),
        ({"norm_statistics": "frozen"}, "'fixed' or 'batch'"),
        ({"keep_last": 0}, "keep_last"),
    ],
)
def test_settings_say_what_is_wrong(changes, said):
    with pytest.raises(UserError, match=said):
        TrainSettings(**{"steps": 10, **changes})


def names(model, parameters):
    chosen = set(map(id, parameters))
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def test_trained_parameters_are_those_of_the_towers():
    model = model_with_state()
    everything = {name for name, _ in model.named_parameters()}
    image = {name for name in everything if name.startswith("image_")}
    text = {name for name in everything if name.startswith("text_")}
    assert names(model, trained_parameters(model, ("image",))) == image
    assert names(model, trained_parameters(model, ("text",))) == text
    assert names(model, trained_parameters(model, ("image", "text"))) == image | text | {"log_logit_scale"}


def test_what_was_frozen_stays_frozen_and_what_nothing_reads_never_trains():
    model = tiny_clip()
    model.image_projection.weight.requires_grad_(False)
    model.unused = torch.nn.Linear(2, 2)
    chosen = names(model, trained_parameters(model, ("image", "text")))
    assert "image_projection.weight" not in chosen and not any(name.startswith("unused") for name in chosen)
    assert not model.image_projection.weight.requires_grad and model.unused.weight.requires_grad


def test_unknown_tower_and_nothing_to_train():
    model = tiny_clip()
    with pytest.raises(UserError, match="did you mean 'image'"):
        trained_parameters(model, ("imgae",))
    with pytest.raises(UserError, match="nothing to train"):
        trained_parameters(model.requires_grad_(False), ("image",))


def test_vectors_and_scalars_do_not_decay():
    model = tiny_clip()
    matrices, rest = decay_groups(list(model.parameters()), 0.1)
    assert matrices["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in matrices["params"]) and all(p.ndim <= 1 for p in rest["params"])
    assert any(p is model.log_logit_scale for p in rest["params"])
    assert len(matrices["params"]) + len(rest["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("statistics", ["fixed", "batch"])
def test_training_mode_is_undone(statistics):
    model = model_with_state().eval()
    norm = model.image_projection[1]
    trained = trained_parameters(model, ("image",))
    with training_mode(model, trained, statistics):
        assert norm.training is (statistics == "batch") and model.image_projection[2].training
        assert norm.weight.requires_grad and not model.log_logit_scale.requires_grad
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_untrained_batch_norm_keeps_its_statistics():
    model = model_with_state()
    with training_mode(model, trained_parameters(model, ("text",)), "batch"):
        assert not model.image_projection[1].training


def test_logit_scale_is_clamped_to_one_hundred():
    model = tiny_clip()
    with torch.no_grad():
        model.log_logit_scale.fill_(6.0)
    clamp_logit_scale(model)
    assert model.logit_scale.item() == pytest.approx(100, rel=1e-6)


def save(folder, step, *, keep_last=2):
    state = tiny_clip().state_dict()
    return checkpoint.save_checkpoint(
        folder,
        weights=state,
        moments={f"exp_avg/{name}": value for name, value in state.items()},
        state={"step": step, "skipped": 0, "told": {"a": {"b": 1}}},
        keep_last=keep_last,
    )


def test_checkpoints_are_complete_and_the_last_ones_stay(tmp_path):
    for step in (1, 2, 10):
        path = save(tmp_path, step)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]
    assert {p.name for p in path.iterdir()} == {
        "weights.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    assert set(json.loads((path / "manifest.json").read_text())) == {
        "weights.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    assert checkpoint.latest_checkpoint(tmp_path) == path
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    weights = bad / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.warns(UserWarning, match=r"weights\.safetensors"):
        assert checkpoint.latest_checkpoint(tmp_path) == good
    (good / "state.json").unlink()
    with pytest.warns(UserWarning):
        assert checkpoint.latest_checkpoint(tmp_path) is None


def test_the_best_stays_however_old(tmp_path):
    checkpoint.mark_best(save(tmp_path, 1))
    for step in (2, 3, 4):
        save(tmp_path, step)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000001", "step-00000003", "step-00000004"]
    assert checkpoint.best_checkpoint(tmp_path) == tmp_path / "step-00000001"
    checkpoint.mark_best(tmp_path / "step-00000004")
    save(tmp_path, 5)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000004", "step-00000005"]


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path):
    """A process that may not write files as large as the weights stands for a full disk: the writes really fail."""
    good = save(tmp_path, 1)
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from training.test_parts import save\n"
        "from fastmat.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "try:\n"
        "    save(Path(sys.argv[1]), 2)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    whole = (good / "weights.safetensors").stat().st_size
    for room in (whole // 2, 2 * whole):
        command = [sys.executable, "-c", script, str(tmp_path), str(room)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        if room < whole:
            assert "could not be written" in done.stdout and f"the last good one is {good}" in done.stdout, done
            assert [path.name for path in tmp_path.iterdir()] == [good.name]
            assert checkpoint.latest_checkpoint(tmp_path) == good
        else:
            assert done.stdout == "" and checkpoint.latest_checkpoint(tmp_path) == tmp_path / "step-00000002", done


def test_a_save_over_a_leftover_starts_anew(tmp_path):
    leftover = tmp_path / ".step-00000003.partial"
    leftover.mkdir()
    (leftover / "junk").write_text("x")
    assert not (save(tmp_path, 3) / "junk").exists() and not leftover.exists()


class Malice:
    def __reduce__(self):
        return (os.mkdir, ("owned",))


def test_code_in_a_checkpoint_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "c", 1)
    (path / "optimizer.safetensors").write_bytes(pickle.dumps(Malice(), protocol=2))
    with pytest.raises(UserError, match=r"optimizer\.safetensors"):
        checkpoint.read_moments(path)
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_of_another_run_says_what_differs(tmp_path):
    path = save(tmp_path, 1)
    assert checkpoint.read_run_state(path, {"a": {"b": 1}})["step"] == 1
    with pytest.raises(UserError, match=r"a\.b was 1, is now 2; c was None, is now 3"):
        checkpoint.read_run_state(path, {"a": {"b": 2}, "c": 3})


def test_differences_of_lists():
    assert checkpoint.differences({"a": [1, 2]}, {"a": [1, 3]}) == ["a was [1, 2], is now [1, 3]"]
    assert checkpoint.differences({"a": [1, 2]}, {"a": [1, 2]}) == []
