"""What MAT's ablation names: cross-modal or uni-modal inner losses, weighed terms, distances, and who trains."""

import pytest
import torch
import torch.nn.functional as F
from defences.labelled_batch import LastWord
from training.synthetic import THREAT, SwapWord, make_batch

from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.objectives import Contrastive, CosineToOwn, KLFromClean, SquaredL2FromClean
from fastmat.attacks.word_substitution import WordSubstitution
from fastmat.defences.mat import DISTANCES, MAT
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.training.forward import encode_views

BATCH = make_batch()


def words(choice):
    return WordSubstitution(candidates=LastWord(), choice=choice, importance="embeds", compare="embeds")


def inner_loss(name, model, x, texts):
    """The image attack's objectives, summed over images, written out."""
    state, clean = model.encode_image(x), model.encode_image(BATCH.images)
    if name == "squared_l2":
        return (state.embeds - clean.embeds).pow(2).sum()
    if name == "kl":
        p, q = clean.embeds.softmax(1), state.embeds.softmax(1)
        return (p * (p.log() - q.log())).sum()
    text = model.encode_text(model.tokenize(texts)).features
    if name == "cosine":
        return -sum((state.features[i] * text[t]).sum() for t, i in enumerate(BATCH.txt2img.tolist()))
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("name", "objective"),
    [("squared_l2", SquaredL2FromClean()), ("kl", KLFromClean()), ("cosine", CosineToOwn())],
)
def test_one_image_step_follows_the_chosen_loss(name, objective):
    model = tiny_clip().eval()

    def attacked(**changes):
        defence = MAT(threat=THREAT, text_search=SwapWord(), objective=objective, steps=1, **changes)
        return defence.perturb(model, BATCH, SeededDraws(2))

    start = attacked(step_size=0.0).images["adv"]
    x = start.clone().requires_grad_(True)
    views = attacked()
    (gradient,) = torch.autograd.grad(inner_loss(name, model, x, views.texts["adv"]), x)
    moved = start + THREAT.eps / 2 * gradient.sign()
    expected = torch.minimum(torch.maximum(moved, BATCH.images - THREAT.eps), BATCH.images + THREAT.eps).clamp(0, 1)
    assert float(((views.images["adv"] - expected).abs() > 1e-5).float().mean()) < 1e-3


@pytest.mark.parametrize("choice", ["kl", "cosine"])
@pytest.mark.parametrize("order", ["text_image", "image_text"])
def test_the_text_choice_is_cross_modal_or_uni_modal(choice, order):
    """cosine: the text least like the image that the order names; kl: the one farthest from its own clean embedding."""
    model = tiny_clip().eval()
    views = MAT(threat=THREAT, text_search=words(choice), order=order, pairs={"adv-adv": 1}).perturb(
        model, BATCH, SeededDraws(0)
    )
    images = views.images["adv"] if order == "image_text" else BATCH.images
    guides = model.encode_image(images).features[BATCH.txt2img]
    for text, chosen, guide in zip(BATCH.texts, views.texts["adv"], guides, strict=True):
        options = [text, *(f"{text.rsplit(' ', 1)[0]} {word}" for word in ("stone", "cloud", "fire"))]
        states = [model.encode_text(model.tokenize([option])) for option in options]
        if choice == "cosine":
            scores = [-(state.embeds[0] @ guide / state.embeds[0].norm()).item() for state in states]
        else:
            clean = states[0].embeds[0].softmax(0)
            scores = [F.kl_div(s.embeds[0].log_softmax(0), clean, reduction="sum").item() for s in states]
        assert chosen == options[max(range(len(options)), key=scores.__getitem__)]


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_squared_and_summed_over_dimensions(name):
    teacher, model = tiny_clip().eval(), tiny_clip(seed=1).eval()
    defence = MAT(threat=THREAT, teacher=teacher, text_search=SwapWord(), pairs={}, distances={name: 0.3})
    views = defence.perturb(model, BATCH, SeededDraws(0))
    terms = defence.loss(encode_views(model, model, views, BATCH))
    modality, view, to = name.split("-")
    # Nothing is encoded that no term reads.
    assert set(views.images if modality == "image" else views.texts) == {view, to} - {"teacher"}
    assert not (views.texts if modality == "image" else views.images)

    def embeds(of, which):
        if modality == "image":
            return of.encode_image(views.images["adv"] if which == "adv" else BATCH.images).embeds
        return of.encode_text(of.tokenize(views.texts["adv"] if which == "adv" else BATCH.texts)).embeds

    target = embeds(teacher, "clean") if to == "teacher" else embeds(model, to)
    rows = [((a - b) ** 2).sum() for a, b in zip(embeds(model, view), target, strict=True)]
    assert list(terms) == [f"distance/{name}"]
    torch.testing.assert_close(terms[f"distance/{name}"], 0.3 * torch.stack(rows).mean(), rtol=1e-4, atol=1e-6)


def test_the_loss_is_a_weighted_sum_of_any_terms():
    teacher, model = tiny_clip().eval(), tiny_clip(seed=1).eval()

    def terms(pairs, distances):
        defence = MAT(threat=THREAT, teacher=teacher, text_search=SwapWord(), pairs=pairs, distances=distances)
        views = defence.perturb(model, BATCH, SeededDraws(0))
        return defence.loss(encode_views(model, model, views, BATCH))

    ones = {"adv-adv": 1.0, "clean-clean": 1.0}, {"image-adv-teacher": 1.0, "text-adv-clean": 1.0}
    unit = terms(*ones)
    weighed = terms({"adv-adv": 0.25, "clean-clean": 4.0}, {"image-adv-teacher": 2.0, "text-adv-clean": 0.5})
    factors = {"contrastive/adv-adv": 0.25, "contrastive/clean-clean": 4.0}
    factors |= {"distance/image-adv-teacher": 2.0, "distance/text-adv-clean": 0.5}
    assert unit.keys() == weighed.keys() == factors.keys()
    for key, factor in factors.items():
        torch.testing.assert_close(weighed[key], factor * unit[key])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"distances": {"image-adv-techer": 1}}, "did you mean 'image-adv-teacher'"),
        ({"distances": {"image-adv-clean": float("inf")}}, "must be finite"),
        ({"distances": {"image-adv-clean": float("nan")}}, "must be finite"),
        ({"distances": {"text-adv-teacher": 1}}, "needs a teacher"),
        ({"pairs": {}}, "needs a pair of positive weight, .* or a distance"),
        ({"pairs": {}, "distances": {"image-adv-clean": 0}}, "needs a pair of positive weight"),
    ],
)
def test_mat_says_what_is_wrong(arguments, said):
    with pytest.raises(UserError, match=said) as caught:
        MAT(threat=THREAT, text_search=SwapWord(), **arguments)
    assert len(str(caught.value).splitlines()) == 1


def test_a_teacher_is_copied_only_for_a_distance_to_it():
    assert MAT(threat=THREAT, text_search=SwapWord(), teacher=tiny_clip(), objective=Contrastive()).teacher is None
    distances = {"image-adv-clean": 1.0}
    assert MAT(threat=THREAT, text_search=SwapWord(), teacher=tiny_clip(), distances=distances).teacher is None
