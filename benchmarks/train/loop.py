"""fastmat's step: what `fastmat.training.loop` does between two log lines, with the same parts."""

from __future__ import annotations

import math
from contextlib import ExitStack
from copy import deepcopy

import torch

from fastmat.attacks.draws import Draws
from fastmat.benchmarks.attacks.setting import Setting
from fastmat.benchmarks.train.job import Contestant, Dtype, Step, Stepped
from fastmat.benchmarks.train.meter import Split
from fastmat.defences.base import Defence
from fastmat.training.engine import Replicated, make_accelerator
from fastmat.training.forward import encode_views
from fastmat.training.outer import Outer
from fastmat.training.parameters import trained_parameters, training_mode
from fastmat.training.peers import Peers
from fastmat.training.settings import TrainSettings
from fastmat.types import Batch


class Loop:
    """One process, on a copy of the setting's model that stays in training mode.

    trains: the towers. compile: of the outer forward. All steps made here share optimiser and model.
    """

    def __init__(self, setting: Setting, split: Split, *, trains: tuple[str, ...], compile: bool = False) -> None:
        self.model = deepcopy(setting.unfrozen)
        self.split = split
        self.device = setting.device
        settings = TrainSettings(steps=1, clip_norm=None, compile=compile)
        chosen = {id(parameter) for parameter in trained_parameters(self.model, trains)}
        trained = {name: p for name, p in self.model.named_parameters() if id(p) in chosen}
        self._mode = ExitStack()  # never left: the model is this loop's own
        self._mode.enter_context(training_mode(self.model, list(trained.values()), settings.norm_statistics))
        self.outer = Outer(self.model, settings, device=self.device)
        self.engine = Replicated(make_accelerator(), self.outer, self.model, trained, settings)
        self.peers = Peers(rank=0, world=1, device=self.device)

    def step(self, defence: Defence, dtype: Dtype) -> Step:
        """The step of a defence, in fp32 or as `precision: bf16` has it."""
        low = dtype == "bfloat16"
        search = getattr(defence, "text_search", None)
        if search is not None:
            for name in ("plan", "search"):
                setattr(search, name, self.split.timed(getattr(search, name), "text"))

        def run(batch: Batch, draws: Draws) -> Stepped:
            self.outer.bf16 = low
            autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=low)
            with self.split("image"), autocast:
                views = defence.perturb(self.model, batch, draws)
            with self.split("outer"):
                features = encode_views(self.engine.forward, self.model, views, batch)
                with autocast:
                    losses = defence.loss(features)
                total = torch.stack(list(losses.values())).sum()
                norm = self.engine.backward(total, rate=0.0)
                gradient, *_ = self.peers.mean([norm, *losses.values()])
                self.engine.step(update=math.isfinite(gradient))
            image_view, text_view = (
                "adv" if "adv" in views_of else "clean" for views_of in (views.images, views.texts)
            )
            return Stepped(views.images[image_view], views.texts.get(text_view, batch.texts), total.detach())

        return run

    def contestant(
        self, defence: Defence, dtype: Dtype, *, kind: str = "fastmat", like: str = "published"
    ) -> Contestant:
        teacher = getattr(defence, "teacher", None)
        return Contestant(
            kind=kind,
            dtype=dtype,
            step=self.step(defence, dtype),
            model=self.model,
            optimizer=self.engine.optimizer,
            watched=() if teacher is None else (teacher.model,),
            like=like,
        )
