"""BERT-Attack on captions, away from the caption itself, as Co-Attack's text attack alone (its `--adv 1`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.benchmarks.attacks.job import Job, Outcome, Runner
from fastmat.benchmarks.attacks.setting import Setting
from fastmat.benchmarks.attacks.words import Published, Tuned
from fastmat.build import Component
from fastmat.models.dual_encoder import DualEncoder
from fastmat.types import ThreatModel

LENGTH = 30  # BERT pieces


def job(setting: Setting) -> Job:
    batch, tokenizer = setting.batch, setting.tokenizer

    def published(threat: ThreatModel) -> Runner:
        model, bert = setting.unfrozen, setting.unfrozen_bert
        words = Published(model=model, bert=bert, tokenizer=tokenizer, length=LENGTH, part="embeds", with_graph=False)

        def run(draws: Draws) -> Outcome:
            return Outcome(batch.images, words(batch.texts), words.trace)

        return run

    def tuned(threat: ThreatModel, model: DualEncoder) -> Runner:
        words = Tuned(model=model, bert=setting.mlm.model, tokenizer=tokenizer, length=LENGTH, part="embeds")
        return lambda draws: Outcome(batch.images, words(batch.texts))

    def objective(images: Tensor, texts: Sequence[str]) -> Tensor:
        return images.new_zeros(len(images))

    return Job(
        name="bert_attack",
        component=Component(
            name="bert_attack", arguments={"choice": "kl", "parity": "official", "quirks": {"text_max_length": LENGTH}}
        ),
        batch=batch,
        threat=ThreatModel(eps=0.0, max_words=1),
        published=published,
        tuned=tuned,
        objective=objective,
        halves=("both",),
    )
