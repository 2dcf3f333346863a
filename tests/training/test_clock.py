"""Where the time of a step goes: the parts of a step add up to it, and each is the one that took it."""

import time

import pytest
import torch
from training.synthetic import THREAT, SwapWord, Synthetic, settings

from fastmat.attacks.pgd import PGD
from fastmat.defences.mat import MAT
from fastmat.models.tiny import tiny_clip
from fastmat.training.clock import StepClock
from fastmat.training.loop import train


def test_borders_part_the_time(monkeypatch):
    times = iter([10.0, 11.0, 13.0, 17.0, 25.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = StepClock(torch.device("cpu"))
    for part in ("loading", "image_attack", "text_attack", "outer"):
        clock.enter(part)
    clock.read()
    assert clock.taken() == {"loading": 1, "image_attack": 2, "text_attack": 4, "outer": 0, "saving": 0}
    clock.enter("loading")
    clock.read()
    assert clock.taken()["outer"] == 8


class Slow(SwapWord):
    """Takes 0.2 s to plan and 0.1 s to search."""

    def plan(self, model, texts):
        time.sleep(0.2)
        return super().plan(model, texts)

    def search(self, model, plan, guide):
        time.sleep(0.1)
        return super().search(model, plan, guide)


def test_a_log_line_says_what_took_the_time(tmp_path, monkeypatch):
    attack_images = PGD.run
    monkeypatch.setattr(PGD, "run", lambda *given: (time.sleep(0.4), attack_images(*given))[1])
    seen = []

    class Watch:
        def logged(self, line):
            seen.append(line)

        def saved(self, step, checkpoint, attacked):
            time.sleep(0.5)

    train(
        tiny_clip(),
        MAT(threat=THREAT, text_search=Slow(), steps=1),
        Synthetic(),
        settings=settings(steps=3, save_every=2, log_every=3),
        out=tmp_path / "run",
        config={},
        watchers=[Watch()],
    )
    (line,) = seen
    taken = line["taken"]
    assert taken["text_attack"] >= 0.9 and taken["image_attack"] >= 1.2 and taken["saving"] >= 0.5
    assert sum(taken.values()) == pytest.approx(line["seconds"], rel=0.5)
    assert sum(taken.values()) <= line["seconds"] + 0.1
