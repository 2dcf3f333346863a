"""MAT as a user runs it: the built-in set, its own masked language model, the real word substitution, and a resume."""

import copy

import pytest
import torch
from training.synthetic import THREAT, settings, weights_of

from fastmat.attacks.base import words_changed
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.word_substitution import WordSubstitution
from fastmat.data.digits import digits_set
from fastmat.data.loader import TrainingBatches
from fastmat.defences.mat import MAT
from fastmat.models.tiny import tiny_clip
from fastmat.text.masked import MaskedCandidates
from fastmat.text.mlm import MaskedLanguageModel
from fastmat.training.loop import train
from fastmat.training.mlm import train_mlm


@pytest.fixture(scope="module")
def digits():
    return digits_set("train").take(48)


@pytest.fixture(scope="module")
def mlm(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlm") / "mlm"
    train_mlm([text for own in digits.captions for text in own], folder, seed=0, steps=30)
    return MaskedLanguageModel.load(folder)


def batches_of(digits, model):
    return TrainingBatches(digits, model.image_transform, batch_size=8, captions_per_image=2, seed=0)


def test_perturb_with_real_words_leaves_no_trace_and_keeps_the_budget(digits, mlm):
    model = tiny_clip().train()
    batch = batches_of(digits, model).batch(0)
    before = copy.deepcopy(model.state_dict())
    stream = torch.get_rng_state()
    defence = MAT(
        threat=THREAT,
        text_search=WordSubstitution(candidates=MaskedCandidates(mlm=mlm)),
        pairs={"adv-adv": 1, "clean-clean": 1},
    )
    views = defence.perturb(model, batch, SeededDraws(0))
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    changed = [words_changed(a, b) for a, b in zip(batch.texts, views.texts["adv"], strict=True)]
    assert max(changed) == 1 and sum(changed) > len(changed) / 2


def test_mat_resumes_bit_for_bit(digits, mlm, tmp_path):
    def run(out, *, resume=False, stop_after=None):
        model = tiny_clip()
        batches = batches_of(digits, model)
        if stop_after is not None:
            batches = StopsAfter(batches, stop_after)
        defence = MAT(threat=THREAT, text_search=WordSubstitution(candidates=MaskedCandidates(mlm=mlm)))
        told = settings(steps=4, save_every=2)
        return train(model, defence, batches, settings=told, out=out, resume=resume, config={})

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "parts", stop_after=3)
    parts = run(tmp_path / "parts", resume=True)
    assert parts.resumed_from == 2
    first, second = weights_of(whole.weights), weights_of(parts.weights)
    assert all(torch.equal(first[key], second[key]) for key in first)


class StopsAfter:
    def __init__(self, batches, steps):
        self.batches = batches
        self.steps = steps

    def iterate(self, start, stop, **share):
        for step, batch in zip(range(start, stop), self.batches.iterate(start, stop, **share), strict=True):
            if step == self.steps:
                raise RuntimeError("power cut")
            yield batch
