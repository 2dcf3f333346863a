"""PMG-AFT against its formula written out, in both forms, with and without the quirks of its code."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from defences.labelled_batch import LABELS, PROMPTS, class_features, labelled_batch
from training.synthetic import THREAT, make_batch

from fastmat.attacks.draws import SeededDraws
from fastmat.defences.pmg_aft import PMGAFT
from fastmat.defences.tecoa import TeCoA
from fastmat.defences.tecoa_itr import TeCoAITR
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.training.forward import encode_views


def probabilities(model, images, columns, scale):
    """[B, C] fp64, each image by itself."""
    rows = []
    for image in images:
        feature = model.encode_image(image[None]).features[0].double()
        exps = torch.stack([(scale * (feature * column).sum()).exp() for column in columns.double()])
        rows.append(exps / exps.sum())
    return torch.stack(rows)


def kl_rows(p, q):
    return torch.stack(
        [sum(a * (a.log() - b.log()) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    )


def moved(model):
    """The student: another model than the teacher."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("image"):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_on_classes_it_is_the_published_formula(summed, cosine):
    teacher, batch = tiny_clip().eval(), labelled_batch()
    defence = PMGAFT(
        threat=THREAT,
        teacher=teacher,
        against="classes",
        prompts=PROMPTS,
        teacher_weight=0.7,
        clean_weight=1.3,
        quirks=Quirks(summed_kl=summed, cosine_logits=cosine),
    )
    student = moved(tiny_clip().eval())
    views = defence.perturb(student, batch, SeededDraws(0))
    terms = defence.loss(encode_views(student, student, views, batch))

    columns = class_features(student)
    scale = 1.0 if cosine else student.logit_scale.item()
    adv = probabilities(student, views.images["adv"], columns, scale)
    clean = probabilities(student, batch.images, columns, scale)
    guide = probabilities(teacher, views.images["adv"], columns, scale)
    label = torch.stack([-adv[i, label].log() for i, label in enumerate(LABELS)]).mean()
    reduce = torch.sum if summed else torch.mean
    expected = {
        "classes": label,
        "kl/teacher": 0.7 * reduce(kl_rows(adv, guide)),
        "kl/clean": 1.3 * reduce(kl_rows(adv, clean)),
    }
    assert terms.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(terms[key].double(), value, rtol=1e-4, atol=1e-6)
        assert float(value.detach()) > 1e-4


def test_on_captions_predictions_run_over_the_captions_of_the_batch():
    teacher, batch = tiny_clip().eval(), make_batch()
    defence = PMGAFT(threat=THREAT, teacher=teacher)
    student = moved(tiny_clip().eval())
    views = defence.perturb(student, batch, SeededDraws(0))
    features = encode_views(student, student, views, batch)
    terms = defence.loss(features)
    columns, scale = student.encode_text(student.tokenize(batch.texts)).features, student.logit_scale.item()
    adv = probabilities(student, views.images["adv"], columns, scale)
    guide = probabilities(teacher, views.images["adv"], columns, scale)  # the text tower is the same
    clean = probabilities(student, batch.images, columns, scale)
    torch.testing.assert_close(terms["kl/teacher"].double(), kl_rows(adv, guide).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["kl/clean"].double(), kl_rows(adv, clean).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["contrastive"], TeCoAITR(threat=THREAT).loss(features)["contrastive"])


def test_a_sum_over_the_batch_is_that_of_all_processes():
    """The loop averages over processes: each of two halves weighs in with the images of both."""
    model, batch = tiny_clip().eval(), labelled_batch()
    arguments = {"threat": THREAT, "teacher": model, "against": "classes", "prompts": PROMPTS}
    defence = PMGAFT(**arguments, quirks=Quirks(summed_kl=True))
    features = encode_views(model, model, defence.perturb(model, batch, SeededDraws(0)), batch)
    both = dataclasses.replace(features, everyone=lambda: SimpleNamespace(group=torch.arange(2 * len(batch))))
    mean = PMGAFT(**arguments).loss(features)["kl/clean"]
    torch.testing.assert_close(defence.loss(features)["kl/clean"], len(batch) * mean)
    torch.testing.assert_close(defence.loss(both)["kl/clean"], 2 * len(batch) * mean)


def test_the_attack_is_tecoa_s():
    model, batch = tiny_clip().eval(), labelled_batch()
    found = PMGAFT(threat=THREAT, teacher=model, against="classes", prompts=PROMPTS).perturb(
        model, batch, SeededDraws(2)
    )
    expected = TeCoA(threat=THREAT, prompts=PROMPTS).perturb(model, batch, SeededDraws(2))
    assert torch.equal(found.images["adv"], expected.images["adv"])
