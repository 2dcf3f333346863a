"""Perturbed token embeddings: the step written out, the ball, padding, and the way through the outer forward."""

import pytest
import torch
import torch.nn.functional as F
from training.synthetic import THREAT, SwapWord, make_batch

from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.objectives import CosineToOwn
from fastmat.defences.embedding_space import EmbeddingSpace
from fastmat.defences.mat import MAT
from fastmat.errors import UserError
from fastmat.models.protocol import TextTokens
from fastmat.models.tiny import tiny_clip
from fastmat.training.forward import encode_views

TEXTS = ("red dog", "a green dog runs over the grass", "water near the red dog")


def guide_of(model, count):
    return F.normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(1)), dim=1)


def embed_by_hand(model, text, shift):
    """The embedding of one caption, its table's rows moved by hand: [L, D] in, [E] out."""
    tokens = model.tokenize([text])
    tower = model.text_tower
    x = tower.token_embedding.weight[tokens.ids[0]] + shift + tower.positional_embedding[: tokens.ids.shape[1]]
    tokens_out = tower.norm(tower.layers(x[None]))[0]
    return model.text_projection(tokens_out.mean(0))


def test_a_shift_is_added_to_the_embeddings_of_the_tokens():
    model = tiny_clip().eval()
    tokens = model.tokenize(TEXTS)
    shift = 0.3 * torch.randn(*tokens.ids.shape, 16, generator=torch.Generator().manual_seed(0))
    found = model.encode_text(tokens._replace(shift=shift)).embeds
    for row, text in enumerate(TEXTS):
        length = int(tokens.mask[row].sum())
        torch.testing.assert_close(found[row], embed_by_hand(model, text, shift[row, :length]), rtol=1e-4, atol=1e-5)
    assert not model.token_embedding._forward_hooks
    plain = model.encode_text(tokens).embeds
    assert float((found - plain).detach().abs().max()) > 1e-2
    moved = TextTokens(tokens.ids, tokens.mask, shift).to("cpu")
    assert moved.shift is not None and torch.equal(moved.shift, shift)


@pytest.mark.parametrize("max_norm", [None, 0.005])
def test_cosine_takes_normalised_steps_inside_the_ball(max_norm):
    model = tiny_clip().eval()
    guide = guide_of(model, 3)
    search = EmbeddingSpace(steps=3, step_size=0.004, max_norm=max_norm)
    found = search.search(model, search.plan(model, TEXTS), guide)
    assert found.texts == TEXTS and found.shift is not None and not found.shift.requires_grad
    for row, text in enumerate(TEXTS):
        length = int(model.tokenize([text]).mask.sum())
        shift = torch.zeros(length, 16)
        for _ in range(3):
            shift.requires_grad_(True)
            embed = embed_by_hand(model, text, shift)
            (gradient,) = torch.autograd.grad(-torch.cosine_similarity(embed, guide[row], dim=0), shift)
            shift = shift.detach() + 0.004 * gradient / gradient.norm()
            if max_norm is not None and shift.norm() > max_norm:
                shift = shift * (max_norm / shift.norm())
        torch.testing.assert_close(found.shift[row, :length], shift, rtol=1e-3, atol=1e-6)
        assert not found.shift[row, length:].any()  # padding


def test_kl_starts_off_the_clean_text_and_ascends():
    model = tiny_clip().eval()

    def kl(steps):
        search = EmbeddingSpace(choice="kl", steps=steps, step_size=0.02, start=0.02)
        plan = search.plan(model, TEXTS)
        shift = search.search(model, plan).shift
        clean = plan.clean.softmax(-1)
        moved = model.encode_text(plan.tokens._replace(shift=shift)).embeds.log_softmax(-1)
        return (clean * (clean.log() - moved)).sum(-1)

    assert bool((kl(4) > kl(1)).all()) and bool((kl(1) > 0).all())


def test_the_start_is_the_text_s_own():
    """Neither the other captions nor their padding matter; another seed does."""
    model = tiny_clip().eval()
    search = EmbeddingSpace(choice="kl", steps=1)
    alone = search.search(model, search.plan(model, TEXTS[:1])).shift
    among = search.search(model, search.plan(model, TEXTS)).shift
    torch.testing.assert_close(among[0, : alone.shape[1]], alone[0], rtol=1e-3, atol=2e-6)
    other = EmbeddingSpace(choice="kl", steps=1, seed=1)
    assert not torch.allclose(other.search(model, other.plan(model, TEXTS[:1])).shift, alone, atol=1e-5)


def test_the_outer_forward_moves_the_adversarial_view_alone():
    model, batch = tiny_clip().eval(), make_batch()
    defence = MAT(threat=THREAT, text_search=EmbeddingSpace(step_size=0.1), pairs={"adv-adv": 1, "clean-clean": 1})
    views = defence.perturb(model, batch, SeededDraws(0))
    assert views.texts == {"adv": batch.texts, "clean": batch.texts} and list(views.shifts) == ["adv"]
    features = encode_views(model, model, views, batch)
    tokens = model.tokenize(batch.texts)
    torch.testing.assert_close(features.texts["clean"].embeds, model.encode_text(tokens).embeds)
    expected = model.encode_text(tokens._replace(shift=views.shifts["adv"])).embeds
    torch.testing.assert_close(features.texts["adv"].embeds, expected)
    own = model.encode_image(batch.images).features[batch.txt2img]
    cosine = [(features.texts[name].features * own).sum(1) for name in ("clean", "adv")]
    assert bool((cosine[1] < cosine[0]).all())


@pytest.mark.parametrize("order", ["text_image", "image_text", "independent"])
def test_the_image_attack_sees_moved_texts_in_that_order_alone(order):
    model, batch = tiny_clip().eval(), make_batch()
    seen = []

    class Spy:
        def bind(self, model, batch, context):
            seen.append(context.text_features)
            return lambda state: state.embeds.sum(-1)

    search = EmbeddingSpace(step_size=0.1)
    views = MAT(threat=THREAT, text_search=search, order=order, objective=Spy()).perturb(model, batch, SeededDraws(0))
    tokens = model.tokenize(batch.texts)
    shift = views.shifts["adv"] if order == "text_image" else None
    torch.testing.assert_close(seen[0], model.encode_text(tokens._replace(shift=shift)).features)


def test_a_view_shorter_than_another_is_padded():
    """A substituted word may lengthen the other view: the shift stays with its own tokens."""
    model, batch = tiny_clip().eval(), make_batch()
    from fastmat.defences.base import Views

    longer = tuple(f"{text} and more words" for text in batch.texts)
    tokens = model.tokenize(batch.texts)
    shift = (
        0.3 * torch.randn(*tokens.ids.shape, 16, generator=torch.Generator().manual_seed(0)) * tokens.mask[..., None]
    )
    views = Views(images={}, texts={"clean": longer, "adv": batch.texts}, shifts={"adv": shift})
    features = encode_views(model, model, views, batch)
    expected = model.encode_text(tokens._replace(shift=shift)).embeds
    torch.testing.assert_close(features.texts["adv"].embeds, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.texts["clean"].embeds, model.encode_text(model.tokenize(longer)).embeds)


def test_a_hidden_table_and_an_objective_on_words_are_one_sentence():
    class Hidden(torch.nn.Module):
        def __init__(self, tower):
            super().__init__()
            self.tower = tower

        def forward(self, ids, mask):
            return self.tower(ids, mask)

    model = tiny_clip()
    model.text_tower = Hidden(model.text_tower)
    search = EmbeddingSpace()
    with pytest.raises(UserError, match="hides its token embeddings"):
        search.search(model, search.plan(model, TEXTS), guide_of(model, 3))
    with pytest.raises(UserError, match="hides its token embeddings"):
        model.encode_text(model.tokenize(TEXTS)._replace(shift=torch.zeros(3, 8, 16)))
    with pytest.raises(UserError, match="reads the words of a caption"):
        MAT(threat=THREAT, text_search=search, objective=CosineToOwn())
    MAT(threat=THREAT, text_search=search, objective=CosineToOwn(), order="independent")
    MAT(threat=THREAT, text_search=SwapWord(), objective=CosineToOwn())
    with pytest.raises(ValueError, match="needs a guide with 3 rows"):
        search.search(tiny_clip(), search.plan(tiny_clip(), TEXTS), None)


def test_defaults_are_villa_s():
    search = EmbeddingSpace()
    assert (search.steps, search.step_size, search.max_norm, search.start) == (2, 1e-3, float("inf"), 0.0)
