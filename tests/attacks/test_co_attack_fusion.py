"""Co-Attack and Sep-Attack on a fusion model against a plain restatement, one image and one caption at a time."""

from dataclasses import dataclass, replace

import pytest
import torch
from batches import random_batch
from oracles.word_substitution import Oracle
from tiny_mlm import tiny_candidates, tiny_captions, tiny_mlm, tiny_parts
from torch import Tensor

from fastmat.attacks.base import context_of
from fastmat.attacks.bert_attack import BertAttack
from fastmat.attacks.co_attack import CoAttack
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.engine import Engine
from fastmat.attacks.fusion import KLFusedFromClean, plan_of
from fastmat.attacks.objectives import KLFromClean
from fastmat.attacks.pgd import PGD
from fastmat.attacks.sep import SepAttack
from fastmat.attacks.word_substitution import WordSubstitution
from fastmat.build import Component, build_attack
from fastmat.errors import UserError
from fastmat.models.albef import Albef
from fastmat.models.protocol import ImageState
from fastmat.models.tiny import tiny_clip
from fastmat.models.tiny_fusion import tiny_albef
from fastmat.quirks import Quirks
from fastmat.text.fused import FusedTexts
from fastmat.text.words import STOP_WORDS
from fastmat.types import Batch, ThreatModel

THREAT = ThreatModel(eps=16 / 255, max_words=1)
# A middle length below the captions', so that it cuts some.
OFFICIAL = CoAttack.official.but(round_trip=False, mid_max_length=6)
QUIRKS = pytest.mark.parametrize("quirks", [Quirks(), OFFICIAL], ids=["correct", "official"])
FORMS = pytest.mark.parametrize("form", ["cls", "fusion"])


def sharp_albef() -> Albef:
    """Both encoders of one width. Tokens so long that a KL between them lies far above rounding."""
    narrow = tiny_albef()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        sizes = replace(narrow.sizes, image_width=16)
        model = Albef(sizes=sizes, tokenizer=narrow.tokenizer, context_length=32).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(10)  # from the narrow start that training wants
        for layer in model.fusion.layers:
            layer.feed_forward.norm.weight.data.mul_(2)
    return model


def words_batch() -> Batch:
    return random_batch((2, 1, 3)).replace(texts=tuple(tiny_captions(6, seed=3)))


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum()


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


@dataclass(kw_only=True)
class Beside(Oracle):
    """The oracle on texts beside one image [3, H, W]."""

    image: Tensor

    def encode(self, text: str) -> dict[str, Tensor]:
        tokens = self.model.tokenize([text], max_length=self.quirks.text_max_length)
        return {"fusion": fused(self.model, self.image, tokens)}


def fused(model: Albef, image: Tensor, tokens) -> Tensor:
    return model.fuse(model.encode_image(image[None]), model.encode_text(tokens)).tokens[0, 0]


def attacked_text(model: Albef, image: Tensor, text: str, quirks: Quirks, form: str) -> str:
    bert, tokenizer = tiny_parts()
    settings = {
        "bert": bert,
        "tokenizer": tokenizer,
        "model": model,
        "stop_words": set(STOP_WORDS),
        "quirks": quirks,
        "max_words": 1,
        "choice": "kl",
        "importance": form,
        "compare": form,
        "top_k": 10,
        "threshold": 0.3,
    }
    if form == "cls":
        return Oracle(**settings).attack(text, None)
    # Normalising takes away what is added here.
    seen = image * model.std + model.mean if quirks.raw_images else image
    return Beside(**settings, image=seen).attack(text, None)


def value(
    model: Albef, x0: Tensor, x: Tensor, pairs: list[tuple[str, str]], form: str, *, co: bool, length: int | None
) -> Tensor:
    """What one image ascends, with its captions and what became of them."""
    image = model.encode_image(x[None])
    total = kl(model.encode_image(x0[None]).tokens[0, 0], image.tokens[0, 0]) if form == "cls" else torch.zeros(())
    for texts in pairs:
        source, moved = (model.tokenize([text], max_length=length) for text in texts)
        term = torch.zeros(())
        if form == "cls" and co:
            term = 3 * kl(unit(model.encode_text(moved).tokens[0, 0]), unit(image.tokens[0, 0]))
        elif form == "fusion" and co:
            now = fused(model, x, moved)
            term = kl(fused(model, x0, moved), now) + 3 * kl(fused(model, x0, source), now)
        elif form == "fusion":
            term = kl(fused(model, x0, source), fused(model, x, source))
        total = total + term / len(pairs)
    return total


def plain(model: Albef, batch: Batch, quirks: Quirks, form: str, *, co: bool, seed: int) -> tuple[Tensor, list[str]]:
    """Four steps, alpha 3, every caption's term written out."""
    eps, images, texts = THREAT.eps, [], []
    for i in range(len(batch)):
        x0 = batch.images[i]
        source = [t for t, owner in zip(batch.texts, batch.txt2img.tolist(), strict=True) if owner == i]
        moved = [attacked_text(model, x0, t, quirks, form) for t in source]
        texts += moved
        pairs = list(zip(source, moved, strict=True))
        pairs = pairs[-1:] if co and quirks.last_caption_only else pairs
        cut = quirks.mid_max_length if co else None
        draw = SeededDraws(seed).uniform("start", batch.index[i : i + 1], x0.shape)[0]
        x = x0 + eps * (draw + 1) / 2 if quirks.one_sided_start else x0 + eps * draw
        x = x.clamp(0, 1) if quirks.clamp_start else x

        for _ in range(4):
            x = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(value(model, x0, x, pairs, form, co=co, length=cut), x)
            x = (x0 + (x.detach() + 1.25 * eps / 4 * gradient.sign() - x0).clamp(-eps, eps)).clamp(0, 1)
        images.append(x.detach())
    return torch.stack(images), texts


@QUIRKS
@FORMS
@pytest.mark.parametrize("attack", [CoAttack, SepAttack])
def test_equals_the_plain_one(attack: type, form: str, quirks: Quirks) -> None:
    model, batch = sharp_albef(), words_batch()
    made = attack(threat=THREAT, candidates=tiny_candidates(), steps=4, representation=form, quirks=quirks, seed=5)
    result = made(model, batch)
    images, texts = plain(model, batch, quirks, form, co=attack is CoAttack, seed=5)
    assert list(result.texts) == texts != list(batch.texts)
    assert ((result.images - images).abs() > 1e-5).float().mean() <= 0.01
    assert result.words_changed.max() == 1
    assert result.distance.max() <= THREAT.eps + 1e-6


@FORMS
@pytest.mark.parametrize("attack", [CoAttack, SepAttack])
def test_the_split_of_a_batch_does_not_matter(attack: type, form: str) -> None:
    model, batch = sharp_albef(), words_batch()
    made = attack(threat=THREAT, candidates=tiny_candidates(), steps=4, representation=form)
    whole = made(model, batch)
    for parts in (
        [made(model, batch.rows(start, stop)) for start, stop in ((0, 1), (1, 3))],
        [made(model, batch, engine=Engine(micro_batch=1))],
    ):
        assert tuple(text for part in parts for text in part.texts) == whole.texts
        images = torch.cat([part.images for part in parts])
        assert ((images - whole.images).abs() > 1e-5).float().mean() <= 0.01


def test_every_quirk_of_the_fusion_form_shows() -> None:
    model, batch = sharp_albef(), words_batch()

    def attacked(quirks: Quirks) -> CoAttack:
        settings = {"candidates": tiny_candidates(), "steps": 2, "representation": "fusion", "quirks": quirks}
        return CoAttack(threat=THREAT, **settings)(model, batch)

    correct = attacked(Quirks())
    for change in ({"mid_max_length": 4}, {"one_sided_start": True}, {"clamp_start": False}):
        assert not torch.equal(attacked(Quirks().but(**change)).images, correct.images), change
    assert attacked(Quirks(raw_images=True)).texts != correct.texts
    last = attacked(Quirks(last_caption_only=True)).images
    assert torch.equal(last[1], correct.images[1])  # its only caption is its last
    assert not torch.equal(last[0], correct.images[0]) and not torch.equal(last[2], correct.images[2])


@pytest.mark.parametrize("form", ["embeds", "cls", "fusion"])
def test_ends_higher_than_it_began_and_leaves_no_trace(form: str) -> None:
    model, batch = sharp_albef().requires_grad_(True).train(), words_batch()
    attack = CoAttack(threat=THREAT, candidates=tiny_candidates(), representation=form)
    result = attack(model, batch)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()
    value = attack.bind(model, batch, context_of(model, batch), result.texts)
    with torch.no_grad():
        assert (value(model.encode_image(result.images)) > value(model.encode_image(batch.images))).all()


def test_an_image_without_captions_stays_at_its_start_in_the_fusion_form() -> None:
    model, batch = sharp_albef(), random_batch((2, 0, 1))
    for attack in (CoAttack, SepAttack):
        made = attack(threat=THREAT, candidates=tiny_candidates(), steps=3, representation="fusion", seed=4)
        images = made(model, batch).images
        draw = SeededDraws(4).uniform("start", batch.index, batch.images.shape[1:])
        start = (batch.images + THREAT.eps * draw).clamp(0, 1)
        torch.testing.assert_close(images[1], start[1], atol=1e-6, rtol=0)
        assert not torch.allclose(images[0], start[0], atol=1e-3)


def test_each_pair_is_fused_once_and_each_image_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = sharp_albef(), words_batch()
    pairs: list[bytes] = []
    encoded: list[int] = []
    fuse, encode = Albef.fuse, Albef.encode_image

    def fusing(self, image: ImageState, text, owner, maps=False):
        of = image.embeds[owner]
        pairs.extend(
            embeds.numpy().tobytes() + ids[mask].numpy().tobytes()
            for embeds, ids, mask in zip(of, text.ids, text.mask, strict=True)
        )
        return fuse(self, image, text, owner, maps)

    def encoding(self, images: Tensor) -> ImageState:
        encoded.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(Albef, "fuse", fusing)
    monkeypatch.setattr(Albef, "encode_image", encoding)
    settings = {"choice": "kl", "importance": "fusion", "compare": "fusion", "max_words": 2}
    words = WordSubstitution(candidates=tiny_candidates(), **settings)
    plan = plan_of(words, model, batch)
    found = words.search(model, plan)
    assert encoded == [3] and len(pairs) == len(set(pairs)) == len(plan.encoded)
    assert words.search(model, plan) == found and len(pairs) == len(plan.encoded)


@pytest.mark.parametrize("positions", [1, 60, None])
def test_chunks_change_nothing(positions: int | None) -> None:
    model, batch = sharp_albef(), words_batch()
    image = model.encode_image(batch.images)
    texts = [(1, 5, 6, 2), (1, 7, 2), (1, 5, 6, 2), (1, 9, 9, 9, 9, 2), (1, 5, 6, 2)]
    captions = [0, 5, 2, 3, 0]
    table = FusedTexts(model, image, batch.txt2img.tolist(), positions=positions)
    with torch.no_grad():
        found = table(texts, captions)["fusion"]
        again = table(texts[::-1], captions[::-1])["fusion"]
    assert len(table) == 4 and torch.equal(found, again.flip(0)) and torch.equal(found[0], found[4])
    for row, ids, caption in zip(found, texts, captions, strict=True):
        tokens = type(model.tokenize(["a"]))(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
        torch.testing.assert_close(
            row, fused(model, batch.images[batch.txt2img[caption]], tokens), atol=1e-5, rtol=1e-5
        )


def test_the_texts_of_sep_attack_are_those_of_bert_attack() -> None:
    model, batch = sharp_albef(), words_batch()
    sep = SepAttack(threat=THREAT, candidates=tiny_candidates(), steps=1, representation="fusion")(model, batch)
    bert = BertAttack(threat=THREAT, candidates=tiny_candidates(), choice="kl", representation="fusion")(model, batch)
    assert sep.texts == bert.texts and torch.equal(bert.images, batch.images)


def test_the_fused_objective_is_one_of_pgd_too() -> None:
    model, batch = sharp_albef(), words_batch()
    arguments = {"objective": "kl_fused", "steps": 4, "step_size": 1.25 * THREAT.eps / 4}
    pgd = build_attack(Component(name="pgd", arguments=arguments), threat=THREAT, mlm=tiny_mlm, seed=5)(model, batch)
    sep = SepAttack(threat=THREAT, candidates=tiny_candidates(), representation="fusion", steps=4, seed=5)(model, batch)
    assert torch.equal(pgd.images, sep.images) and pgd.texts == batch.texts


def test_bf16_reaches_the_fusion_encoder_and_states_come_out_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = sharp_albef(), words_batch()
    inside, fuse = [], model.fusion.forward

    def fusing(*arguments, **settings):
        tokens, maps = fuse(*arguments, **settings)
        inside.append(model.itm_head(tokens[:, 0]).dtype)
        return tokens, maps

    monkeypatch.setattr(model.fusion, "forward", fusing)
    attack = CoAttack(threat=THREAT, candidates=tiny_candidates(), steps=2, representation="fusion")
    result = attack(model, batch, engine=Engine(precision="bf16"))
    assert set(inside) == {torch.bfloat16} and result.images.dtype == torch.float32
    assert "fuse" not in vars(model)


@pytest.mark.parametrize(
    "attack",
    [
        CoAttack(threat=THREAT, candidates=tiny_candidates(), representation="fusion"),
        SepAttack(threat=THREAT, candidates=tiny_candidates(), representation="fusion"),
        BertAttack(threat=THREAT, candidates=tiny_candidates(), choice="kl", representation="fusion"),
        PGD(threat=THREAT, objective=KLFusedFromClean()),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_a_model_without_a_fusion_encoder(attack) -> None:
    with pytest.raises(UserError, match=r"DualEncoder does not fuse images with texts.*take a model that does"):
        attack(tiny_clip(), words_batch())


def test_class_tokens_that_are_not_there_or_do_not_compare() -> None:
    for attack in (CoAttack, SepAttack):
        with pytest.raises(UserError, match="DualEncoder begin with no class token; use 'embeds'"):
            attack(threat=THREAT, candidates=tiny_candidates(), representation="cls")(tiny_clip(), words_batch())
    with pytest.raises(UserError, match="the image encoder's are 24 wide and the text encoder's 16"):
        CoAttack(threat=THREAT, candidates=tiny_candidates(), representation="cls")(tiny_albef(), words_batch())
    SepAttack(threat=THREAT, candidates=tiny_candidates(), representation="cls", steps=1)(tiny_albef(), words_batch())


def test_fusion_of_words_alone() -> None:
    source = tiny_candidates()
    for settings in (
        {"importance": "fusion"},
        {"importance": "fusion", "compare": "fusion"},
        {"choice": "kl", "importance": "fusion"},
        {"choice": "kl", "compare": "fusion"},
    ):
        with pytest.raises(UserError, match="'fusion' needs choice 'kl', and stands for both"):
            WordSubstitution(candidates=source, **settings)
    words = WordSubstitution(candidates=source, choice="kl", importance="fusion", compare="fusion")
    with pytest.raises(UserError, match="needs an image beside each caption"):
        words.plan(sharp_albef(), ["a dog"])


@pytest.mark.parametrize("name", ["co_attack", "sep"])
def test_from_a_config(name: str) -> None:
    arguments = {"representation": "fusion", "steps": 2, "parity": "official", "quirks": {"round_trip": False}}
    attack = build_attack(Component(name=name, arguments=arguments), threat=THREAT, mlm=tiny_mlm, seed=3)
    assert attack.words.quirks.raw_images and attack.words.judged == "fusion"
    result = attack(tiny_albef(), words_batch())
    assert result.texts != words_batch().texts
    with pytest.raises(UserError, match="representation"):
        build_attack(Component(name=name, arguments={"representation": "fused"}), threat=THREAT, mlm=tiny_mlm, seed=3)


def test_what_a_kl_compares() -> None:
    model, batch = sharp_albef(), words_batch()
    with torch.no_grad():
        clean = model.encode_image(batch.images)
        moved = model.encode_image(batch.images.flip(0))
        for what, rows in {
            "embeds": lambda state: state.embeds,
            "features": lambda state: state.features,
            "cls": lambda state: state.tokens[:, 0],
            "tokens": lambda state: state.tokens.flatten(1),
        }.items():
            got = KLFromClean(representation=what).bind(model, batch, None)(moved)
            want = [kl(a, b) for a, b in zip(rows(clean), rows(moved), strict=True)]
            torch.testing.assert_close(got, torch.stack(want), atol=1e-5, rtol=1e-4)
