"""Co-Attack against a plain restatement, image by image and caption by caption."""

import math

import pytest
import torch
from batches import random_batch
from oracles.word_substitution import Oracle
from tiny_mlm import tiny_candidates, tiny_captions, tiny_parts
from torch import Tensor

from fastmat.attacks.base import context_of
from fastmat.attacks.co_attack import CoAttack, mean_kl_from
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.sep import SepAttack
from fastmat.errors import UserError
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.text.words import STOP_WORDS
from fastmat.types import Batch, ThreatModel

THREAT = ThreatModel(eps=16 / 255, max_words=1)
# A middle length below the captions': at the published 77 none of these would be cut.
OFFICIAL = CoAttack.official.but(round_trip=False, mid_max_length=6)


def words_batch() -> Batch:
    return random_batch((2, 1, 3)).replace(texts=tuple(tiny_captions(6, seed=3)))


def sharp_clip() -> DualEncoder:
    """Embeddings so long that a KL between them lies far above rounding."""
    model = tiny_clip(seed=2).eval().requires_grad_(False)
    model.image_projection.weight.data.mul_(20)
    return model


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum()


def plain_co_attack(model: DualEncoder, batch: Batch, quirks: Quirks, *, seed: int) -> tuple[Tensor, list[str]]:
    """Four steps with alpha 3, one image at a time, every caption's term written out."""
    bert, tokenizer = tiny_parts()
    words = Oracle(
        bert=bert,
        tokenizer=tokenizer,
        model=model,
        stop_words=set(STOP_WORDS),
        quirks=quirks,
        max_words=1,
        choice="kl",
        importance="embeds",
        compare="embeds",
        top_k=10,
        threshold=0.3,
    )
    eps, images, texts = THREAT.eps, [], []
    for i in range(len(batch)):
        x0 = batch.images[i]
        own = [words.attack(t, None) for t, of in zip(batch.texts, batch.txt2img.tolist(), strict=True) if of == i]
        texts += own
        read = own[-1:] if quirks.last_caption_only else own
        targets = [model.encode_text(model.tokenize([t], max_length=quirks.mid_max_length)).embeds[0] for t in read]
        clean = model.encode_image(x0[None]).embeds[0]
        draw = SeededDraws(seed).uniform("start", batch.index[i : i + 1], x0.shape)[0]
        x = x0 + eps * (draw + 1) / 2 if quirks.one_sided_start else (x0 + eps * draw).clamp(0, 1)
        for _ in range(4):
            x = x.detach().requires_grad_(True)
            e = model.encode_image(x[None]).embeds[0]
            across = sum(kl(t / t.norm(), e / e.norm()) for t in targets) / len(targets)
            (gradient,) = torch.autograd.grad(kl(clean, e) + 3 * across, x)
            moved = x.detach() + 1.25 * eps / 4 * gradient.sign()
            x = (x0 + (moved - x0).clamp(-eps, eps)).clamp(0, 1)
        images.append(x.detach())
    return torch.stack(images), texts


@pytest.mark.parametrize("quirks", [Quirks(), OFFICIAL], ids=["correct", "official"])
def test_equals_the_plain_one(quirks: Quirks) -> None:
    model, batch = sharp_clip(), words_batch()
    result = CoAttack(threat=THREAT, candidates=tiny_candidates(), steps=4, quirks=quirks, seed=5)(model, batch)
    images, texts = plain_co_attack(model, batch, quirks, seed=5)
    assert list(result.texts) == texts != list(batch.texts)
    assert ((result.images - images).abs() > 1e-5).float().mean() <= 0.01
    assert result.words_changed.max() == 1
    assert result.distance.max() <= THREAT.eps + 1e-6


def test_every_quirk_of_the_image_step_moves_the_image() -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch()

    def images(quirks: Quirks) -> Tensor:
        return CoAttack(threat=THREAT, candidates=tiny_candidates(), steps=2, quirks=quirks)(model, batch).images

    correct = images(Quirks())
    for change in ({"mid_max_length": 4}, {"one_sided_start": True}, {"clamp_start": False}):
        assert not torch.equal(images(Quirks().but(**change)), correct), change
    last = images(Quirks(last_caption_only=True))
    assert torch.equal(last[1], correct[1])  # its only caption is its last
    assert not torch.equal(last[0], correct[0]) and not torch.equal(last[2], correct[2])


def test_without_the_cross_term_it_is_sep_attack() -> None:
    model, batch = sharp_clip(), words_batch()
    co = CoAttack(threat=THREAT, candidates=tiny_candidates(), alpha_cross=0.0, seed=1)(model, batch)
    sep = SepAttack(threat=THREAT, candidates=tiny_candidates(), seed=1)(model, batch)
    assert co.texts == sep.texts and torch.equal(co.images, sep.images)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ends_higher_than_it_began_and_within_both_budgets(norm) -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch()
    threat = ThreatModel(eps=8 / 255 if norm == "linf" else 1.0, norm=norm, max_words=2)
    attack = CoAttack(threat=threat, candidates=tiny_candidates())
    result = attack(model, batch)
    value = attack.bind(model, batch, context_of(model, batch), result.texts)
    with torch.no_grad():
        assert (value(model.encode_image(result.images)) > value(model.encode_image(batch.images))).all()
    assert (result.distance > 0).all() and result.distance.max() <= threat.eps + 1e-6
    assert result.words_changed.max() == 2
    assert result.images.min() >= 0 and result.images.max() <= 1


def test_a_budget_of_nothing_leaves_that_modality_alone() -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch()
    still = CoAttack(threat=ThreatModel(eps=0.0, max_words=1), candidates=tiny_candidates(), steps=2)(model, batch)
    assert torch.equal(still.images, batch.images) and still.texts != batch.texts
    silent = CoAttack(threat=ThreatModel(eps=4 / 255, max_words=0), candidates=tiny_candidates(), steps=2)(model, batch)
    assert silent.texts == batch.texts and (silent.distance > 0).all()


def test_the_split_of_a_batch_does_not_matter() -> None:
    model, batch = sharp_clip(), words_batch()
    attack = CoAttack(threat=THREAT, candidates=tiny_candidates(), steps=4)
    whole = attack(model, batch)
    parts = [attack(model, batch.rows(start, stop)) for start, stop in ((0, 1), (1, 3))]
    assert parts[0].texts + parts[1].texts == whole.texts
    images = torch.cat([part.images for part in parts])
    assert ((images - whole.images).abs() > 1e-5).float().mean() <= 0.01


@pytest.mark.parametrize("last_caption_only", [False, True])
def test_an_image_without_captions_is_attacked_away_from_itself_alone(last_caption_only: bool) -> None:
    model, batch = sharp_clip(), random_batch((2, 0, 1))
    quirks = Quirks(last_caption_only=last_caption_only)
    co = CoAttack(threat=THREAT, candidates=tiny_candidates(), quirks=quirks)(model, batch)
    sep = SepAttack(threat=THREAT, candidates=tiny_candidates(), quirks=quirks)(model, batch)
    assert torch.equal(co.images[1], sep.images[1]) and not torch.equal(co.images[0], sep.images[0])


def test_mean_kl_is_the_mean_over_own_targets_and_so_is_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    targets, rows = (torch.randn(n, 7, generator=generator) * 4 for n in (6, 4))
    rows.requires_grad_(True)
    owner = torch.tensor([2, 0, 2, 2, 0, 3])  # row 1 has none
    got = mean_kl_from(targets, owner, 4)(rows)
    want = [
        torch.stack([kl(t, row) for t in targets[owner == i]]).mean() if (owner == i).any() else row.new_zeros(())
        for i, row in enumerate(rows)
    ]
    torch.testing.assert_close(got, torch.stack(want), atol=1e-6, rtol=1e-5)
    gradients = [torch.autograd.grad(values.sum(), rows)[0] for values in (got, torch.stack(want))]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_mean_kl_of_distributions_with_zeros() -> None:
    """Places to which one target, or every target, gives no probability at all."""
    targets = torch.tensor([[0.0, 2000.0, -2000.0], [2000.0, 0.0, -2000.0]])
    rows = torch.zeros(1, 3, requires_grad=True)
    value = mean_kl_from(targets, torch.tensor([0, 0]), 1)(rows)
    assert value.item() == pytest.approx(math.log(3))
    assert torch.autograd.grad(value.sum(), rows)[0].isfinite().all()


def test_the_text_attack_gets_its_settings() -> None:
    source = tiny_candidates()
    words = CoAttack(threat=ThreatModel(max_words=3), candidates=source, beam=2, quirks=OFFICIAL).words
    assert (words.choice, words.importance, words.judged) == ("kl", "embeds", "embeds")
    assert (words.max_words, words.candidates, words.beam, words.quirks) == (3, source, 2, OFFICIAL)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"step_size": -1.0}, "step_size"),
        ({"alpha_cross": -1.0}, "alpha_cross"),
        ({"alpha_cross": math.nan}, "alpha_cross"),
        ({"alpha_cross": math.inf}, "alpha_cross"),
        ({"beam": 0}, "beam"),
    ],
)
def test_bad_settings(setting: dict, name: str) -> None:
    with pytest.raises(UserError, match=name):
        CoAttack(threat=THREAT, candidates=tiny_candidates(), **setting)
