"""What every defence owes: no trace of its attack, the budget, gradients to the trained towers alone, clear errors."""

import copy
import random

import numpy as np
import pytest
import torch
from defences.labelled_batch import PROMPTS, LastWord, labelled_batch, stateful
from training.synthetic import SwapWord, make_batch

from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.objectives import CosineToOwn, KLFromClean
from fastmat.defences.embedding_space import EmbeddingSpace
from fastmat.defences.fare import FARE
from fastmat.defences.mat import MAT
from fastmat.defences.mmcoa import MMCoA
from fastmat.defences.pmg_aft import PMGAFT
from fastmat.defences.sim_clip import SimCLIP
from fastmat.defences.tecoa import TeCoA
from fastmat.defences.tecoa_itr import TeCoAITR
from fastmat.defences.tga_zsr import TGAZSR
from fastmat.errors import UserError
from fastmat.models.small import small_clip
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.training.forward import encode_views
from fastmat.training.parameters import trained_parameters
from fastmat.types import ThreatModel

THREAT = ThreatModel(eps=8 / 255)
CLASSES = {"against": "classes", "prompts": PROMPTS}
DEFENCES = {
    "tecoa": lambda model: TeCoA(threat=THREAT, prompts=PROMPTS),
    "tecoa_itr": lambda model: TeCoAITR(threat=THREAT, steps=2),
    "fare": lambda model: FARE(threat=THREAT, teacher=model, steps=2),
    "mmcoa": lambda model: MMCoA(threat=THREAT, candidates=LastWord(), steps=2),
    "mmcoa_classes": lambda model: MMCoA(threat=THREAT, candidates=LastWord(), steps=2, trains=("image",), **CLASSES),
    "pmg_aft": lambda model: PMGAFT(threat=THREAT, teacher=model),
    "pmg_aft_both": lambda model: PMGAFT(threat=THREAT, teacher=model, trains=("image", "text")),
    "pmg_aft_classes": lambda model: PMGAFT(threat=THREAT, teacher=model, **CLASSES),
    "sim_clip": lambda model: SimCLIP(threat=THREAT, steps=2),
    "sim_clip_frozen": lambda model: SimCLIP(threat=THREAT, teacher=model, steps=2, quirks=Quirks(frozen_siamese=True)),
    "tga_zsr": lambda model: TGAZSR(threat=THREAT, teacher=model),
    "tga_zsr_classes": lambda model: TGAZSR(threat=THREAT, teacher=model, **CLASSES),
    "mat_embedding_space": lambda model: MAT(threat=THREAT, text_search=EmbeddingSpace()),
    "mat_uni_modal": lambda model: MAT(
        threat=THREAT, text_search=EmbeddingSpace(choice="kl"), objective=KLFromClean(), order="independent"
    ),
    "mat_distances": lambda model: MAT(
        threat=THREAT,
        teacher=model,
        text_search=SwapWord(),
        objective=CosineToOwn(),
        distances={"image-adv-teacher": 1, "text-adv-teacher": 1, "image-adv-clean": 1, "text-clean-teacher": 1},
    ),
    "mat_vision_only": lambda model: MAT(threat=THREAT, text_search=SwapWord(), trains=("image",)),
}


def batch_for(name: str):
    return labelled_batch() if "classes" in name or name == "tecoa" else make_batch()


@pytest.mark.parametrize("name", DEFENCES)
def test_perturb_leaves_no_trace(name):
    model = stateful()
    model.text_tower.eval()
    next(model.text_tower.parameters()).requires_grad_(False)
    defence = DEFENCES[name](model)
    batch = batch_for(name)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    images = batch.images.clone()
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002

    views = defence.perturb(model, batch, SeededDraws(0))

    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert np.array_equal(np.random.get_state()[1], streams[2])  # noqa: NPY002
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(batch.images, images)
    constants = [*views.images.values(), *views.targets.values(), *views.shifts.values()]
    assert not any(tensor.requires_grad for tensor in constants)


@pytest.mark.parametrize("name", DEFENCES)
def test_perturb_is_a_function_of_batch_and_draws(name):
    model = stateful()
    defence, batch = DEFENCES[name](model), batch_for(name)
    first, second = (defence.perturb(model, batch, SeededDraws(1)) for _ in range(2))
    assert torch.equal(first.images["adv"], second.images["adv"]) and first.texts == second.texts
    assert all(torch.equal(first.shifts[name], second.shifts[name]) for name in first.shifts)


@pytest.mark.parametrize("name", DEFENCES)
def test_adversarial_images_spend_the_budget_and_no_more(name):
    model = tiny_clip()
    batch = batch_for(name)
    adv = DEFENCES[name](model).perturb(model, batch, SeededDraws(0)).images["adv"]
    distance = (adv - batch.images).abs().flatten(1).amax(1)
    assert bool((distance <= THREAT.eps + 1e-6).all()) and bool((distance > 0.9 * THREAT.eps).all())
    assert adv.dtype == torch.float32 and adv.min() >= 0 and adv.max() <= 1


@pytest.mark.parametrize("name", DEFENCES)
def test_gradients_reach_the_trained_towers_and_nothing_else(name):
    model = stateful()
    defence, batch = DEFENCES[name](model), batch_for(name)
    views = defence.perturb(model, batch, SeededDraws(0))
    trained = {id(parameter) for parameter in trained_parameters(model, defence.trains)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    terms = defence.loss(encode_views(model, model, views, batch))
    assert all(term.dim() == 0 and bool(term.isfinite()) for term in terms.values())
    sum(terms.values()).backward()
    reached = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    moved = {key for key in reached if bool(model.get_parameter(key).grad.abs().max() > 0)}
    towers = {key.split("_")[0] for key in moved if key != "log_logit_scale"}
    assert towers == set(defence.trains)
    assert all(id(model.get_parameter(key)) in trained for key in reached)
    teacher = getattr(defence, "teacher", None)
    assert teacher is None or all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())


@pytest.mark.parametrize("name", ["fare", "pmg_aft", "sim_clip_frozen", "tga_zsr", "mat_distances"])
def test_a_teacher_of_another_width_is_one_sentence(name):
    teacher = small_clip(vocabulary=None, widths=(8, 16), text_width=16, layers=1, heads=2, embed_dim=24)
    defence = DEFENCES[name](teacher)
    with pytest.raises(UserError, match="the teacher embeds in 24 dimensions and the model in 16"):
        defence.perturb(tiny_clip(), make_batch(), SeededDraws(0))


@pytest.mark.parametrize("name", ["fare", "pmg_aft", "sim_clip_frozen", "mat_distances"])
def test_the_teacher_is_the_model_before_training(name):
    """What comes from the teacher does not change when the model does."""
    model = tiny_clip()
    defence, batch = DEFENCES[name](model), make_batch()

    def of_teacher():
        # No attack, so that a guide on adversarial images sees the same ones.
        idle = copy.deepcopy(defence)
        if hasattr(idle, "attack"):
            idle.attack.threat = ThreatModel(eps=0.0)
        else:
            idle.threat = ThreatModel(eps=0.0)
        targets = idle.perturb(model, batch, SeededDraws(0)).targets
        return {key: targets[key] for key in targets if key in ("teacher", "image", "text")}

    before = of_teacher()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    after = of_teacher()
    assert before and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TeCoA(threat=THREAT, prompts=None), "the captions of this set are no class labels"),
        (lambda: TeCoA(threat=THREAT, prompts=PROMPTS, steps=0), "steps must be at least 1, got 0"),
        (lambda: MMCoA(threat=THREAT, candidates=LastWord(), image_weight=-1), "image_weight must not be negative"),
        (lambda: MMCoA(threat=THREAT, candidates=LastWord(), against="class"), "did you mean 'classes'"),
        (lambda: MMCoA(threat=THREAT, candidates=LastWord(), **CLASSES), "the text tower cannot train"),
        (lambda: PMGAFT(threat=THREAT, teacher=tiny_clip(), clean_weight=-1), "clean_weight must not be negative"),
        (lambda: PMGAFT(threat=THREAT, teacher=tiny_clip(), against="classes"), "no class labels"),
        (lambda: SimCLIP(threat=THREAT, quirks=Quirks(frozen_siamese=True)), "frozen_siamese needs a teacher"),
        (lambda: SimCLIP(threat=THREAT, step_size=-1.0), "step_size must be a finite number"),
        (lambda: TGAZSR(threat=THREAT, teacher=tiny_clip(), refinement_weight=-1), "refinement_weight must not be"),
        (lambda: EmbeddingSpace(steps=0), "steps must be at least 1"),
        (lambda: EmbeddingSpace(max_norm=0), "max_norm must be positive or null, got 0"),
        (lambda: EmbeddingSpace(choice="cos"), "choice must be one of kl, cosine"),
        (lambda: EmbeddingSpace(choice="kl", start=0), "start must be positive for choice 'kl'"),
        (lambda: EmbeddingSpace(start=float("nan")), "start must be a finite number"),
    ],
)
def test_bad_arguments_are_one_sentence(make, said):
    with pytest.raises(UserError, match=said) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 1


def test_a_caption_that_is_no_prompt_is_named():
    defence = TeCoA(threat=THREAT, prompts=PROMPTS)
    batch = labelled_batch()
    odd = batch.replace(texts=(*batch.texts[:-1], "a red hound"))
    with pytest.raises(UserError, match="caption 'a red hound' is no class prompt"):
        defence.perturb(tiny_clip(), odd, SeededDraws(0))
