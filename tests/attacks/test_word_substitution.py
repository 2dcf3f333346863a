"""The batched search against the plain one, and what it must keep whatever it is given."""

from functools import cache

import pytest
import torch
from oracles.word_substitution import Oracle
from tiny_mlm import tiny_candidates, tiny_captions, tiny_mlm, tiny_parts
from torch import Tensor

from fastmat.attacks.word_substitution import WordSubstitution
from fastmat.errors import UserError
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.text.masked import MaskedCandidates
from fastmat.text.words import STOP_WORDS

CORRECT = Quirks()
OFFICIAL = Quirks.official(text_max_length=14)
BERT_LIKE = Quirks.official(round_trip=False, text_max_length=9)
PRECISION = 1e-6  # scores closer than this may be ordered either way by rounding


@cache
def model() -> DualEncoder:
    return tiny_clip(seed=3).eval().requires_grad_(False)


def guides(count: int, *, seed: int = 0) -> Tensor:
    draws = torch.randn(count, model().text_projection.out_features, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(draws, dim=-1)


def attack(texts: list[str], guide: Tensor | None = None, **settings) -> tuple[str, ...]:
    search = WordSubstitution(candidates=tiny_candidates(threshold=1.5), **settings)
    return search.search(model(), search.plan(model(), texts), guides(len(texts)) if guide is None else guide)


@pytest.mark.parametrize(
    ("choice", "importance", "compare", "max_words"),
    [
        ("cosine", "features", "features", 1),
        ("cosine", "features", "features", 2),
        ("cosine", "embeds", "embeds", 2),
        ("kl", "embeds", "cls", 2),
        ("kl", "cls", "tokens", 1),
        ("kl", "tokens", "embeds", 1),
    ],
)
@pytest.mark.parametrize("quirks", [CORRECT, OFFICIAL, BERT_LIKE], ids=["correct", "official", "bert"])
def test_equals_one_at_a_time(quirks: Quirks, choice: str, importance: str, compare: str, max_words: int) -> None:
    texts = tiny_captions(14, seed=max_words)
    guide = guides(len(texts), seed=max_words)
    settings = {"quirks": quirks, "choice": choice, "importance": importance, "compare": compare}
    found = attack(texts, guide, max_words=max_words, **settings)
    bert, tokenizer = tiny_parts()
    oracle = Oracle(bert, tokenizer, model(), set(STOP_WORDS), max_words=max_words, top_k=10, threshold=1.5, **settings)
    compared = changed = 0
    for text, adversarial, own in zip(texts, found, guide, strict=True):
        expected = oracle.attack(text, own)
        if oracle.gap > PRECISION:
            assert adversarial == expected
            compared += 1
            changed += adversarial != text
    assert compared >= 10
    assert changed >= 8


@pytest.mark.parametrize("quirks", [CORRECT, OFFICIAL], ids=["correct", "official"])
def test_two_guides_share_a_plan(quirks: Quirks) -> None:
    texts = tiny_captions(30)
    search = WordSubstitution(candidates=tiny_candidates(threshold=1.5), quirks=quirks)
    plan = search.plan(model(), texts)
    first = search.search(model(), plan, guides(30))
    seen = len(plan.encoded)
    assert search.search(model(), plan, guides(30)) == first
    assert len(plan.encoded) == seen
    assert search.search(model(), plan, guides(30, seed=1)) == attack(texts, guides(30, seed=1), quirks=quirks) != first


@pytest.mark.parametrize("choice", ["cosine", "kl"])
def test_the_batch_changes_no_text(choice: str) -> None:
    texts = tiny_captions(12, seed=5)
    whole = attack(texts, choice=choice)
    halves = [attack(texts[i : i + 4], guides(12)[i : i + 4], choice=choice) for i in (0, 4, 8)]
    assert tuple(text for half in halves for text in half) == whole


def test_every_text_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tiny_captions(10, seed=2)
    rows: list[bytes] = []
    encode = DualEncoder.encode_text

    def counting(self: DualEncoder, tokens):
        rows.extend(ids[mask].numpy().tobytes() for ids, mask in zip(tokens.ids, tokens.mask, strict=True))
        return encode(self, tokens)

    monkeypatch.setattr(DualEncoder, "encode_text", counting)
    search = WordSubstitution(candidates=tiny_candidates(threshold=1.5))
    plan = search.plan(model(), [*texts, *texts])
    assert len(rows) <= len(set(texts)) + sum(len(of) for of in plan.importance[:10])
    found = search.search(model(), plan, guides(10).repeat(2, 1))
    before = len(rows)
    assert before == len(set(rows)) == len(plan.encoded)
    search.search(model(), plan, guides(10).repeat(2, 1))
    search.features(model(), found, plan=plan)
    assert len(rows) == before


def test_cosine_never_rises_and_kl_never_falls() -> None:
    texts, guide = tiny_captions(30, seed=9), guides(30)
    search = WordSubstitution(candidates=tiny_candidates(threshold=1.5), max_words=3)
    plan = search.plan(model(), texts)
    found = search.search(model(), plan, guide)
    clean, adversarial = (search.features(model(), of) for of in (texts, found))
    drop = ((clean - adversarial) * guide).sum(1)
    assert bool((drop >= 0).all())
    assert all(
        (before == after) == (abs(value) < 1e-6) for before, after, value in zip(texts, found, drop, strict=True)
    )


@pytest.mark.parametrize("quirks", [CORRECT, OFFICIAL, BERT_LIKE], ids=["correct", "official", "bert"])
@pytest.mark.parametrize("choice", ["cosine", "kl"])
def test_odd_captions(choice: str, quirks: Quirks) -> None:
    nothing_to_do = ["", "   ", "the", "a the in on", "."]
    odd = ["狗 在 雪 中", "🐕 dog 🎾", "собака бежит", "dog\tcat\nman", "dog " * 500, "[SEP] dog [PAD]", "dog", "dog"]
    texts = [*nothing_to_do, *odd]
    found = attack(texts, torch.ones(len(texts), 16) / 4, quirks=quirks, choice=choice)
    assert list(found[: len(nothing_to_do)]) == nothing_to_do
    assert found[-1] == found[-2]
    for text, adversarial in zip(texts, found, strict=True):
        if not quirks.blanks_in_candidates:
            pairs = zip(text.split(" "), adversarial.split(" "), strict=True)
            assert sum(a != b for a, b in pairs) <= 1


def test_defaults_are_the_published_constants() -> None:
    search = WordSubstitution(candidates=tiny_candidates())
    assert (search.max_words, search.beam) == (1, 1)
    source = MaskedCandidates(mlm=tiny_mlm())
    assert (source.top_k, source.threshold, source.cache) == (10, 0.3, None)
    assert (search.choice, search.importance, search.judged) == ("cosine", "features", "features")
    assert search.quirks == Quirks()


def test_features_are_read_as_the_victim_reads() -> None:
    texts = ["The red dogs , 狗", "a dog runs in the park"]

    def direct(texts: list[str], **limit: int) -> Tensor:
        return model().encode_text(model().tokenize(texts, **limit)).features

    plain = WordSubstitution(candidates=tiny_candidates())
    torch.testing.assert_close(plain.features(model(), texts), direct(texts))
    torch.testing.assert_close(plain.features(model(), texts, max_length=5), direct(texts, max_length=5))
    published = WordSubstitution(candidates=tiny_candidates(), quirks=OFFICIAL)
    torch.testing.assert_close(
        published.features(model(), texts, max_length=5), direct(["the red dogs", "a dog runs in"])
    )


def test_nothing_at_all() -> None:
    assert attack([], guides(0)) == ()
    assert attack(["dog", "cat"], guides(2), max_words=0) == ("dog", "cat")


def test_global_random_state_and_weights_are_untouched() -> None:
    before = torch.random.get_rng_state()
    weights = {key: value.clone() for key, value in model().state_dict().items()}
    attack(tiny_captions(4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(value, weights[key]) for key, value in model().state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choice": "cos"}, "choice"),
        ({"importance": "feature"}, "importance"),
        ({"compare": "embed"}, "compare"),
        ({"beam": 0}, "beam"),
        ({"max_words": -1}, "max_words"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        WordSubstitution(candidates=tiny_candidates(), **settings)


def test_cosine_without_guide() -> None:
    search = WordSubstitution(candidates=tiny_candidates())
    plan = search.plan(model(), ["dog"])
    for guide in (None, guides(2)):
        with pytest.raises(ValueError, match="one per caption"):
            search.search(model(), plan, guide)
