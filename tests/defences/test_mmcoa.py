"""MMCoA against its formula written out, its two independent attacks, and the label quirk."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from defences.labelled_batch import LABELS, PROMPTS, LastWord, class_features, labelled_batch
from training.synthetic import THREAT, make_batch

from fastmat.attacks.draws import SeededDraws
from fastmat.defences.mmcoa import MMCoA
from fastmat.defences.tecoa import TeCoA
from fastmat.defences.tecoa_itr import TeCoAITR
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.training.forward import encode_views


def mmcoa(**arguments):
    return MMCoA(threat=THREAT, candidates=LastWord(), **{"steps": 2, **arguments})


def both_directions(model, images, texts, image_group, text_group):
    """CE(image to text) + CE(text to image), the target uniform over positives; row by row in fp64."""
    image = model.encode_image(images).features.double()
    text = torch.cat([model.encode_text(model.tokenize([t])).features for t in texts]).double()
    logits = model.logit_scale.item() * image @ text.T

    def mean_ce(rows, row_group, column_group):
        each = [-(row.log_softmax(0)[column_group == own]).mean() for row, own in zip(rows, row_group, strict=True)]
        return torch.stack(each).mean()

    return mean_ce(logits, image_group, text_group) + mean_ce(logits.T, text_group, image_group)


@pytest.mark.parametrize("pairs_only", [False, True])
def test_loss_is_half_the_two_cross_entropies_of_both_pairs(pairs_only):
    model, batch = tiny_clip().eval(), make_batch()
    defence = mmcoa(quirks=Quirks(pairs_only=pairs_only))
    views = defence.perturb(model, batch, SeededDraws(0))
    terms = defence.loss(encode_views(model, model, views, batch))
    group = torch.arange(len(batch)) if pairs_only else batch.group
    text_group = batch.txt2img if pairs_only else batch.text_group
    for name, images, texts in (
        ("adv-clean", views.images["adv"], batch.texts),
        ("clean-adv", batch.images, views.texts["adv"]),
    ):
        expected = 0.5 * both_directions(model, images, texts, group, text_group)
        torch.testing.assert_close(terms[f"contrastive/{name}"].double(), expected, rtol=1e-5, atol=1e-5)
    assert len(terms) == 2
    assert len(set(batch.group.tolist())) < len(batch)  # else the quirk would have nothing to do


def test_weights_and_official_values():
    model, batch = tiny_clip().eval(), make_batch()
    views = mmcoa().perturb(model, batch, SeededDraws(0))
    features = encode_views(model, model, views, batch)
    plain, weighed = mmcoa().loss(features), mmcoa(image_weight=0.25, text_weight=1.5).loss(features)
    torch.testing.assert_close(weighed["contrastive/adv-clean"], 0.5 * plain["contrastive/adv-clean"])
    torch.testing.assert_close(weighed["contrastive/clean-adv"], 3 * plain["contrastive/clean-adv"])
    published = MMCoA(threat=THREAT, candidates=LastWord())
    assert (published.image_attack.steps, published.trains) == (10, ("image", "text"))


def test_the_image_attack_sees_clean_texts_or_all_classes():
    model = tiny_clip().eval()
    on_captions = mmcoa().perturb(model, make_batch(), SeededDraws(0)).images["adv"]
    as_tecoa_itr = TeCoAITR(threat=THREAT, steps=2).perturb(model, make_batch(), SeededDraws(0)).images["adv"]
    assert torch.equal(on_captions, as_tecoa_itr)
    classes = {"against": "classes", "prompts": PROMPTS, "trains": ("image",), "step_size": THREAT.eps}
    on_classes = mmcoa(**classes).perturb(model, labelled_batch(), SeededDraws(0)).images["adv"]
    as_tecoa = TeCoA(threat=THREAT, prompts=PROMPTS).perturb(model, labelled_batch(), SeededDraws(0)).images["adv"]
    assert torch.equal(on_classes, as_tecoa)


def test_the_text_attack_takes_the_word_farthest_by_kl():
    model, batch = tiny_clip().eval(), make_batch()
    found = mmcoa().perturb(model, batch, SeededDraws(0)).texts["adv"]
    for text, chosen in zip(batch.texts, found, strict=True):
        start = text.rsplit(" ", 1)[0]
        options = [text, *(f"{start} {word}" for word in ("stone", "cloud", "fire"))]
        embeds = torch.cat([model.encode_text(model.tokenize([t])).embeds for t in options])
        clean = embeds[0].softmax(0)
        kl = [F.kl_div(e.log_softmax(0), clean, reduction="sum").item() for e in embeds]
        assert chosen == options[max(range(len(options)), key=kl.__getitem__)]


def test_the_label_quirk_is_refused_over_several_processes():
    model, batch = tiny_clip().eval(), make_batch()
    defence = mmcoa(quirks=Quirks(pairs_only=True))
    features = encode_views(model, model, defence.perturb(model, batch, SeededDraws(0)), batch)
    with pytest.raises(UserError, match="pairs_only is for one process"):
        defence.loss(dataclasses.replace(features, everyone=lambda: None))


def test_labels_and_prompts_agree():
    """The helper's own labels are what the classes say, so that the tests above compare what they claim."""
    batch = labelled_batch()
    first = [batch.texts[batch.txt2img.tolist().index(i)] for i in range(len(batch))]
    assert [next(c for c, texts in enumerate(PROMPTS) if text in texts) for text in first] == list(LABELS)
    assert class_features(tiny_clip()).shape == (len(PROMPTS), 16)
