"""Trackers hear every line, and never end a run."""

import json
from typing import ClassVar

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from training.synthetic import Synthetic, settings

from fastmat.defences.finetune import FineTune
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.training import trackers
from fastmat.training.loop import train
from fastmat.training.trackers import Tracking

CONFIG = {"model": {"name": "tiny"}, "widths": [1, 2]}


class Notebook(GeneralTracker):
    """Keeps what it is told; `fails` names a method that does not work."""

    name = "wandb"
    requires_logging_directory = False
    kept: ClassVar[dict[str, object]] = {}
    fails = ""

    def __init__(self, run_name, dir=None):
        super().__init__(_blank=True)
        Notebook.kept = {"lines": []}

    def start(self):
        self._may("start")

    def store_init_configuration(self, values):
        Notebook.kept["config"] = values

    def log(self, values, step=None):
        self._may("log")
        Notebook.kept["lines"].append({"step": step, **values})

    def finish(self):
        self._may("finish")
        Notebook.kept["finished"] = True

    def _may(self, what):
        if self.fails == what:
            raise ConnectionError("no route to host")


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Notebook)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["wandb"])
    monkeypatch.setattr(Notebook, "fails", "")
    return Notebook


def trained(out, name):
    tracking = Tracking(name, out=out, told=CONFIG, accelerator=Accelerator(cpu=True))
    train(
        tiny_clip(),
        FineTune(),
        Synthetic(),
        settings=settings(steps=3),
        out=out,
        config={},
        watchers=[tracking],
    )
    tracking.close()
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_every_line_is_tracked(tmp_path, notebook):
    lines = trained(tmp_path / "run", "wandb")
    assert [line["step"] for line in notebook.kept["lines"]] == [1, 2, 3]
    for seen, line in zip(notebook.kept["lines"], lines, strict=True):
        (term,) = line["terms"]
        assert seen[f"terms/{term}"] == line["terms"][term] and seen["lr"] == line["lr"]
        assert seen["taken/outer"] == line["taken"]["outer"]
    assert notebook.kept["config"] == {"model/name": "tiny", "widths": "[1, 2]"}
    assert notebook.kept["finished"]


@pytest.mark.parametrize("fails", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_a_warning(tmp_path, notebook, monkeypatch, fails):
    monkeypatch.setattr(Notebook, "fails", fails)
    with pytest.warns(UserWarning, match="tracker failed") as told:
        lines = trained(tmp_path / "run", "wandb")
    assert len(lines) == 3
    assert len([w for w in told if "tracker failed" in str(w.message)]) == 1


def test_what_is_not_installed_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    with pytest.warns(UserWarning, match="wandb is not installed"):
        assert len(trained(tmp_path / "run", "wandb")) == 3
    assert trained(tmp_path / "auto", "auto") and not (tmp_path / "auto" / "trackers").exists()


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        Tracking("tensorbord", out=tmp_path, told={}, accelerator=Accelerator(cpu=True))


def test_tensorboard_is_the_default_where_it_is_installed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = trained(tmp_path / "run", "auto")
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "tensorboard"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [(x["step"], x["loss"]) for x in lines]
