"""The universal perturbation: C-PGC's objective against a loop, fit on some data and judged on other."""

from dataclasses import replace

import pytest
import torch
from batches import random_batch

from fastmat.attacks.base import context_of, text_features, words_changed
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.universal import Universal
from fastmat.attacks.universal_contrast import contrast, farthest, read_corpus
from fastmat.attacks.universal_file import UniversalPerturbation
from fastmat.attacks.universal_word import choose_word, most_important, with_word
from fastmat.build import check
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.types import ThreatModel

THREAT = ThreatModel(eps=12 / 255)


@pytest.fixture(scope="module")
def model():
    return tiny_clip().eval()


def pairs(count: int, *, seed: int, batch_size: int = 6, size: int = 32):
    """`count` images with one to three captions each, cut into batches."""
    whole = random_batch([1 + i % 3 for i in range(count)], seed=seed, size=size)
    return [whole.rows(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]


@pytest.fixture(scope="module")
def train():
    return pairs(24, seed=1)


@pytest.fixture(scope="module")
def fitted(model, train):
    attack = Universal(threat=THREAT, epochs=5, n_words=8, n_captions=12)
    attack.fit(model, train)
    return attack


def held_out_value(model, batch, images, *, draw_seed=5):
    """Mean objective of changed images, from its definition."""
    corpus = read_corpus(model, [batch])
    drawn = corpus.drawn(SeededDraws(draw_seed), "judge", batch.index, 4)
    with torch.no_grad():
        clean, moved = (model.encode_image(x).features for x in (batch.images, images))
    which = farthest(clean, corpus.own_mean[drawn], corpus.group, corpus.group[drawn])
    other = drawn.gather(1, which[:, None])[:, 0]
    own = corpus.captions_of(torch.arange(len(batch)))
    return float(contrast(moved, clean, own, corpus.captions_of(other), temperature=0.1, alpha=0.1).mean())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_delta_does_more_to_unseen_images_than_a_random_one(norm, model, train, fitted) -> None:
    attack = fitted
    if norm == "l2":
        attack = Universal(threat=ThreatModel(eps=2.0, norm="l2", max_words=0), epochs=4, scales=(0.5,))
        attack.fit(model, train)
    unseen = pairs(30, seed=2, batch_size=30)[0]
    ours = held_out_value(model, unseen, attack(model, unseen).images)
    delta, generator = attack.perturbation.delta, torch.Generator().manual_seed(0)
    others = []
    for _ in range(20):
        random = torch.randn(delta.shape, generator=generator)
        random = random.sign() * attack.threat.eps if norm == "linf" else random * delta.norm() / random.norm()
        others.append(held_out_value(model, unseen, (unseen.images + random).clamp(0, 1)))
    assert ours > max(others)
    assert ours > held_out_value(model, unseen, unseen.images)


def test_both_budgets_hold_and_one_delta_and_word_serve_all(model, fitted) -> None:
    batch = random_batch((2, 1, 3, 2), seed=3)
    result = fitted(model, batch)
    assert (result.distance <= THREAT.eps + 1e-6).all() and (result.words_changed <= 1).all()
    inside = (batch.images > THREAT.eps) & (batch.images < 1 - THREAT.eps)
    delta = fitted.perturbation.delta.expand_as(batch.images)
    torch.testing.assert_close((result.images - batch.images)[inside], delta[inside], atol=1e-6, rtol=0)
    assert delta.abs().max() <= THREAT.eps
    word = fitted.perturbation.word
    assert all(word in text.split(" ") for text in result.texts) and (result.words_changed == 1).any()


def test_no_words_no_word(model, train) -> None:
    attack = Universal(threat=replace(THREAT, max_words=0), epochs=1)
    attack.fit(model, train)
    batch = random_batch()
    assert attack.perturbation.word is None and attack(model, batch).texts == batch.texts


def test_seed_determines_the_fit_and_nothing_is_left_in_the_model(model, train) -> None:
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    deltas, words = [], []
    for seed in (0, 0, 1):
        attack = Universal(threat=THREAT, epochs=1, scales=(0.5,), n_words=4, n_captions=4, seed=seed)
        attack.fit(model, train)
        deltas.append(attack.perturbation.delta)
        words.append(attack.perturbation.word)
    assert torch.equal(deltas[0], deltas[1]) and words[0] == words[1]
    assert not torch.equal(deltas[0], deltas[2])
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()


def test_split_changes_nothing(model, fitted) -> None:
    batch = random_batch((2, 1, 3, 2), seed=4)
    context = context_of(model, batch)
    whole = fitted(model, batch, context)
    parts = [fitted(model, batch.rows(i, i + 1), context) for i in range(4)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert tuple(text for part in parts for text in part.texts) == whole.texts


def test_contrast_in_a_loop(model) -> None:
    corpus = read_corpus(model, pairs(9, seed=6, batch_size=4))
    whole = pairs(9, seed=6, batch_size=9)[0]
    own_texts = [[t for t, i in zip(whole.texts, whole.txt2img.tolist(), strict=True) if i == n] for n in range(9)]
    rows, other = torch.arange(9), torch.arange(9).flip(0)
    moved = corpus.images.roll(1, 0)
    got = contrast(
        moved, corpus.images, corpus.captions_of(rows), corpus.captions_of(other), temperature=0.1, alpha=0.3
    )
    for n in range(9):
        mean = text_features(model, own_texts[n]).mean(0)
        torch.testing.assert_close(corpus.own_mean[n], mean, atol=1e-6, rtol=1e-5)
        own, far = (sum(((moved[n] @ text_features(model, own_texts[m]).T) / 0.1).exp()) for m in (n, 8 - n))
        expected = -(own / (own + far)).log() + 0.3 * (moved[n] - corpus.images[n]).square().sum()
        torch.testing.assert_close(got[n], expected, atol=1e-5, rtol=1e-4)


def test_farthest_is_of_another_group() -> None:
    keys = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]]).expand(2, 3, 2)
    clean = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    groups = torch.tensor([[0, 5, 1], [0, 5, 1]])
    assert farthest(clean, keys, torch.tensor([5, 5]), groups).tolist() == [2, 0]
    assert farthest(clean, keys, torch.tensor([9, 9]), groups).tolist() == [1, 0]


def test_the_most_important_word_one_at_a_time(model) -> None:
    texts = ["the red dog runs", "the", "a , .", "small  bird near the big house", "dog"]
    expected: list[int | None] = []
    for text in texts:
        words = text.split(" ")
        clean = text_features(model, [text])[0].softmax(0)
        scores = {}
        for i, word in enumerate(words):
            if word and word not in ("the", "a", ",", ".", "near"):
                masked = text_features(model, [" ".join([*words[:i], "[UNK]", *words[i + 1 :]])])[0].softmax(0)
                scores[i] = float((clean * (clean / masked).log()).sum())
        expected.append(max(scores, key=scores.__getitem__) if scores else None)
    assert most_important(model, texts) == expected
    assert expected[1:3] == [None, None] and expected[4] == 0
    assert with_word(model, texts, "zebra")[1:3] == ("the", "a , .")


def test_the_word_is_the_best_of_the_vocabulary(model, train) -> None:
    corpus, words = read_corpus(model, train), ("dog", "zebra", "purple", "quickly", "seven")
    settings = {"targets": 4, "temperature": 0.1, "alpha": 0.1}
    chosen = choose_word(model, corpus, words, SeededDraws(0), n_captions=999, **settings)
    # Every caption is judged; a word alone can then be judged as a vocabulary of its own, by the same draws.
    drawn = corpus.drawn(SeededDraws(0), "text_targets", torch.arange(len(corpus.captions)), 4)
    mean = {}
    for word in words:
        adversarial = text_features(model, with_word(model, corpus.captions, word))
        total = 0.0
        for t, image in enumerate(corpus.txt2img.tolist()):
            others = [r for r in drawn[t].tolist() if corpus.group[r] != corpus.group[image]]
            far = min(others, key=lambda r, t=t: float(corpus.texts[t] @ corpus.images[r]))
            own, other = (float((adversarial[t] @ corpus.images[r] / 0.1).exp()) for r in (image, far))
            moved = float((adversarial[t] - corpus.texts[t]).square().sum())
            total += float(torch.tensor(1 + other / own).log()) + 0.1 * moved
        mean[word] = total / len(corpus.captions)
    assert chosen == max(mean, key=mean.__getitem__)


def test_a_file_brings_back_what_was_fitted(tmp_path, model, fitted) -> None:
    fitted.save(tmp_path / "uap.safetensors")
    loaded = Universal(threat=THREAT, perturbation=tmp_path / "uap.safetensors")
    batch = random_batch(seed=8)
    one, other = fitted(model, batch), loaded(model, batch)
    assert torch.equal(one.images, other.images) and one.texts == other.texts
    assert [path.name for path in tmp_path.iterdir()] == ["uap.safetensors"]


@pytest.mark.parametrize("size", [16, 33, 64])
def test_another_resolution(size, model, fitted) -> None:
    batch = random_batch(seed=9, size=size)
    result = fitted(model, batch)
    assert fitted.perturbation.at(size, size).abs().max() <= THREAT.eps * (1 + 1e-6)
    assert (result.images != batch.images).any() and (result.distance <= THREAT.eps + 1e-6).all()


def test_vocabulary_file(tmp_path, model, train) -> None:
    (tmp_path / "words.txt").write_text("zebra\n\n  purple \nzebra\n")
    attack = Universal(threat=THREAT, epochs=1, vocabulary=tmp_path / "words.txt")
    attack.fit(model, train)
    assert attack.vocabulary == ("zebra", "purple") and attack.perturbation.word in attack.vocabulary
    assert max(words_changed("a red dog", text) for text in with_word(model, ["a red dog"], "zebra")) == 1


def test_unfitted(tmp_path, model) -> None:
    attack = Universal(threat=THREAT)
    with pytest.raises(UserError, match=r"call fit\(model, batches\)"):
        attack(model, random_batch())
    with pytest.raises(UserError, match=r"call fit\(model, batches\)"):
        attack.save(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"targets": 0}, "targets must be at least 1"),
        ({"step_size": -1.0}, "step_size must be a finite number"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"vocabulary": "nowhere.txt"}, "vocabulary nowhere.txt cannot be read"),
        ({"perturbation": "nowhere.safetensors"}, "nowhere.safetensors does not exist"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        Universal(threat=THREAT, **arguments)


def test_bad_files(tmp_path, fitted) -> None:
    path = tmp_path / "uap.safetensors"
    path.write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="holds no universal perturbation"):
        UniversalPerturbation.load(path)
    replace(fitted.perturbation, delta=torch.zeros(1, 4, 4)).save(path)
    with pytest.raises(UserError, match=r"delta must be finite, \[3, H, W\]"):
        UniversalPerturbation.load(path)
    replace(fitted.perturbation, word="two words").save(path)
    with pytest.raises(UserError, match="word must be one word"):
        UniversalPerturbation.load(path)
    fitted.save(path)
    with pytest.raises(UserError, match=r"was fitted within linf 0\.0470588"):
        Universal(threat=ThreatModel(eps=2 / 255), perturbation=path)
    with pytest.raises(UserError, match="cannot be written"):
        fitted.save(tmp_path / "no_folder" / "uap.safetensors")
    (tmp_path / "words.txt").write_text("good\nbad luck\n")
    with pytest.raises(UserError, match="'bad luck', which is several words"):
        Universal(threat=THREAT, vocabulary=tmp_path / "words.txt")


def test_bad_batches(model, train) -> None:
    attack = Universal(threat=THREAT, epochs=1, n_words=2, n_captions=2)
    with pytest.raises(UserError, match="got an iterator"):
        attack.fit(model, iter(train))
    with pytest.raises(UserError, match="at least two groups"):
        attack.fit(model, [])
    with pytest.raises(UserError, match="one resolution"):
        attack.fit(model, [*train, *pairs(6, seed=2, size=16)])
    with pytest.raises(UserError, match="divide 8-bit pixels by 255"):
        attack.fit(model, [train[0].replace(images=train[0].images * 255)])

    class Shuffled:
        turn = 0

        def __iter__(self):
            self.turn += 1
            return iter(train if self.turn == 1 else train[::-1])

    with pytest.raises(UserError, match="same images in the same order"):
        attack.fit(model, Shuffled())
    assert attack.perturbation is None


def test_its_arguments_have_names_in_a_config() -> None:
    check(Universal, {"epochs": 3, "scales": [0.5], "perturbation": "uap.safetensors"}, where="attack")
    with pytest.raises(UserError, match="unknown key 'epoch'"):
        check(Universal, {"epoch": 3}, where="attack")
