"""Several words with a beam, against trying every text that a beam of that width may follow."""

from itertools import product

import pytest
import torch
from tiny_mlm import tiny_candidates, tiny_captions
from torch import Tensor

from fastmat.attacks.base import words_changed
from fastmat.attacks.word_substitution import WordSubstitution
from fastmat.models.tiny import tiny_clip


def setting(count: int):
    model = tiny_clip(seed=3).eval().requires_grad_(False)
    guide = torch.randn(count, 16, generator=torch.Generator().manual_seed(1))
    return model, tiny_captions(count, seed=6), torch.nn.functional.normalize(guide, dim=1)


def score(model, text: str, guide: Tensor) -> float:
    return -float(model.encode_text(model.tokenize([text])).features[0] @ guide)


def by_hand(model, plan, t: int, guide: Tensor, *, beam: int, max_words: int) -> str:
    """The beam of one caption, one text at a time."""
    drafts = [(plan.words[t], 0)]
    for i in plan.order[t]:
        grown = []
        for words, changed in drafts:
            grown.append((words, changed))
            if changed < max_words:
                grown += [((*words[:i], c, *words[i + 1 :]), changed + 1) for c in plan.candidates[t][i]]
        grown.sort(key=lambda draft: -score(model, " ".join(draft[0]), guide))
        drafts = grown[:beam]
    return " ".join(drafts[0][0])


@pytest.mark.parametrize(("beam", "max_words"), [(1, 2), (2, 2), (4, 3)])
def test_equals_the_beam_by_hand(beam: int, max_words: int) -> None:
    model, texts, guides = setting(12)
    search = WordSubstitution(candidates=tiny_candidates(threshold=1.5), beam=beam, max_words=max_words)
    plan = search.plan(model, texts)
    found = search.search(model, plan, guides)
    for t, (text, guide) in enumerate(zip(texts, guides, strict=True)):
        expected = by_hand(model, plan, t, guide, beam=beam, max_words=max_words)
        assert score(model, found[t], guide) == pytest.approx(score(model, expected, guide), abs=2e-6)
        assert words_changed(text, found[t]) <= max_words


def test_a_beam_of_everything_is_exhaustive() -> None:
    model, texts, guides = setting(8)
    search = WordSubstitution(candidates=tiny_candidates(top_k=3, threshold=1.5), beam=10_000, max_words=2)
    plan = search.plan(model, texts)
    found = search.search(model, plan, guides)
    for t, guide in enumerate(guides):
        words = plan.words[t]
        options = [(word, *plan.candidates[t].get(i, ())) for i, word in enumerate(words)]
        every = [of for of in product(*options) if sum(a != b for a, b in zip(of, words, strict=True)) <= 2]
        assert score(model, found[t], guide) == pytest.approx(max(score(model, " ".join(of), guide) for of in every))


def test_a_wider_beam_finds_more_harmful_pairs_of_words() -> None:
    model, texts, guides = setting(60)
    totals = []
    for beam in (1, 4):
        search = WordSubstitution(candidates=tiny_candidates(threshold=1.5), beam=beam, max_words=2)
        found = search.search(model, search.plan(model, texts), guides)
        totals.append(sum(score(model, text, guide) for text, guide in zip(found, guides, strict=True)))
    assert totals[1] > totals[0] + 0.01
