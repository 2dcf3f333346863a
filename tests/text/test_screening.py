import pytest
import torch
from tiny_mlm import tiny_candidates, tiny_captions

from fastmat.attacks.word_substitution import WordSubstitution
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.text.screening import estimates
from fastmat.text.spelling import Speller


def attack(screen: int | None, count: int = 60, **settings):
    model = tiny_clip(seed=3).eval().requires_grad_(False)
    guide = torch.nn.functional.normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    search = WordSubstitution(candidates=tiny_candidates(threshold=1.5), screen=screen, **settings)
    texts = tiny_captions(count, seed=4)
    found = search.search(model, search.plan(model, texts), guide)
    scores = -(search.features(model, found) * guide).sum(1)
    return texts, found, scores


def test_the_estimate_is_the_derivative_along_the_embeddings() -> None:
    model = tiny_clip(seed=1).eval().requires_grad_(False).double()
    speller = Speller(model)
    text, variant = (speller.ids(of.split(" ")) for of in ("a red dog runs", "a blue dog runs"))
    guide = torch.randn(16, dtype=torch.float64)

    def score(state):
        return state.embeds.double() @ guide

    (found,) = estimates(model, [text], [[variant]], score)
    table = model.token_embedding
    before, step = table.weight.clone(), 1e-3
    old, new = text[2], variant[2]
    values = []
    for sign in (1, -1):
        table.weight.data[old] = before[old] + sign * step * (before[new] - before[old])
        values.append(score(model.encode_text(model.tokenize(["a red dog runs"]))).item())
    table.weight.data.copy_(before)
    assert found[0] == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-2)


def test_variants_of_other_lengths_and_equal_ones() -> None:
    model = tiny_clip(seed=1).eval().requires_grad_(False)
    speller = Speller(model)
    text, *variants = (
        speller.ids(of.split(" ")) for of in ("a red dog", "a red dog", "a big blue dog", "a dog", "a red dog dog")
    )
    (found,) = estimates(model, [text], [variants], lambda state: state.embeds.sum(1))
    assert found[0] == 0
    assert len(set(found)) == 4
    assert estimates(model, [text], [[]], lambda state: state.embeds.sum(1)) == [[]]


@pytest.mark.parametrize("settings", [{}, {"max_words": 2, "beam": 3}])
def test_screening_nothing_out_is_exact(settings: dict) -> None:
    assert attack(1000, **settings)[1] == attack(None, **settings)[1]


def test_what_is_left_out_costs_little() -> None:
    texts, exact, best = attack(None)
    _, screened, scores = attack(2)
    _, _, clean = attack(None, max_words=0)
    changed = [n for n, (a, b) in enumerate(zip(texts, exact, strict=True)) if a != b]
    same = sum(exact[n] == screened[n] for n in changed)
    assert bool((scores <= best + 1e-6).all())
    assert 0.5 * len(changed) < same < len(changed)
    assert (scores - clean).sum() > 0.8 * (best - clean).sum()


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="screen must be at least 1"):
        attack(0)
    with pytest.raises(UserError, match="choice 'cosine'"):
        WordSubstitution(candidates=tiny_candidates(), choice="kl", screen=2)


def test_a_model_that_hides_its_embeddings() -> None:
    model = tiny_clip().eval().requires_grad_(False)
    model.text_tower = torch.nn.Sequential(model.text_tower)
    with pytest.raises(UserError, match="token embeddings"):
        estimates(model, [(1, 5, 2)], [[(1, 6, 2)]], lambda state: state.embeds.sum(1))
