"""CMI-Attack against a plain restatement of the published loop, image by image and word by word."""

import random
from math import hypot
from pathlib import Path

import pytest
import torch
from batches import random_batch
from oracles.word_substitution import Oracle
from tiny_mlm import STOPS, WORDS, tiny_candidates, tiny_captions, tiny_mlm, tiny_parts
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from fastmat.attacks.base import context_of
from fastmat.attacks.cmi import CMI
from fastmat.attacks.draws import SeededDraws
from fastmat.build import ATTACKS, Component, build_attack
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.text.neighbours import Neighbours
from fastmat.text.words import STOP_WORDS
from fastmat.types import Batch, ThreatModel

THREAT = ThreatModel(eps=32 / 255, max_words=1)  # far enough for the perturbed image to choose other words
OFFICIAL = CMI.official.but(round_trip=False, text_max_length=30)
SCALES = (0.5, 0.75, 1.25, 1.5)
# Some words of the captions have a vector and some, as "dogs" and "redder", leave the choice to the language model.
KNOWN = [*STOPS, *WORDS[::2], "u.s.", "Cat", "dog's", "wolf", "ocean"]


def words_batch(captions: tuple[int, ...] = (2, 1, 3)) -> Batch:
    batch = random_batch(captions)
    return batch.replace(texts=tuple(tiny_captions(sum(captions), seed=3)))


def vectors() -> dict[str, list[float]]:
    draw = random.Random(4)
    return {word: [draw.gauss(0, 1) for _ in range(6)] for word in KNOWN}


@pytest.fixture
def candidates(tmp_path: Path) -> Neighbours:
    lines = [" ".join([word, *map(repr, row)]) for word, row in vectors().items()]
    (tmp_path / "glove.txt").write_text("\n".join(lines))
    return Neighbours(path=tmp_path / "glove.txt", top_k=10, fallback=tiny_candidates())


def most_similar(word: str) -> list[str]:
    table = vectors()

    def cosine(other: str) -> float:
        products = [a * b for a, b in zip(table[word], table[other], strict=True)]
        return sum(products) / hypot(*table[word]) / hypot(*table[other])

    return sorted((other for other in table if other != word), key=cosine, reverse=True)[:10]


def plain_oracle(model, quirks: Quirks) -> Oracle:
    bert, tokenizer = tiny_parts()
    return Oracle(
        bert=bert,
        tokenizer=tokenizer,
        model=model,
        stop_words=set(STOP_WORDS),
        quirks=quirks,
        max_words=1,
        choice="cosine",
        importance="features",
        compare="features",
        top_k=10,
        threshold=0.3,
    )


@torch.no_grad()
def plain_text(oracle: Oracle, text: str, guide: Tensor) -> tuple[str, bool]:
    """The adversarial caption, and whether its new word was a neighbour's."""
    words, quirks = text.split(" "), oracle.quirks
    clean = oracle.encode(text)["features"]
    masked = [oracle.encode(" ".join([*words[:i], "[UNK]", *words[i + 1 :]]))["features"] for i in range(len(words))]
    importance = [oracle.kl(clean, features) for features in masked]
    for i in sorted(range(len(words)), key=lambda i: -importance[i]):
        word = words[i] if quirks.case_sensitive_filters else words[i].strip(".,'-[]")
        if not word or oracle.stops(word) or oracle.stops(words[i]):
            continue
        spellings = [word] if quirks.case_sensitive_filters else [word, word.lower()]
        entry = next((spelling for spelling in spellings if spelling in KNOWN), None)
        if entry is not None:
            proposed = [neighbour for neighbour in most_similar(entry) if not oracle.filtered(word, neighbour)]
            proposed = [words[i].replace(word, neighbour) for neighbour in proposed if "." not in neighbour]
        else:
            logits = oracle.bert(torch.tensor([oracle.ids(text)])).logits[0]
            before = sum(len(oracle.tokenizer.tokenize(other)) for other in words[:i])
            first = before + quirks.candidate_row_offset
            best = logits.topk(10)
            rows = slice(first, first + len(oracle.tokenizer.tokenize(words[i])))
            proposed = oracle.candidates(best.indices[rows].tolist(), best.values[rows].tolist())
            proposed = [c for c in proposed if not oracle.filtered(words[i], c) and "." not in c]
        texts = [text, *(" ".join([*words[:i], c, *words[i + 1 :]]) for c in proposed)]
        scores = [-float(oracle.encode(other)["features"] @ guide) for other in texts]
        winner = scores.index(max(scores))
        if winner > 0:
            return texts[winner], entry is not None
    return text, False


def plain_cmi(
    model, batch: Batch, quirks: Quirks, *, text_steps: int, steps: int, seed: int
) -> tuple[Tensor, list[str], set[bool]]:
    """Images, texts, and from where the new words came."""
    oracle, draws, eps = plain_oracle(model, quirks), SeededDraws(seed), THREAT.eps
    images, texts, sources = [], [], set()
    for n in range(len(batch)):
        x0, index = batch.images[n], batch.index[n : n + 1]
        own = [t for t, of in zip(batch.texts, batch.txt2img.tolist(), strict=True) if of == n]
        momentum = torch.zeros_like(x0)

        def start(name: str, x0=x0, index=index) -> Tensor:
            return (x0 + eps * draws.uniform(name, index, x0.shape)[0]).clamp(0, 1)

        def gradient(x: Tensor, captions: list[str], step: int, index=index) -> Tensor:
            length = quirks.text_max_length
            targets = torch.cat([model.encode_text(model.tokenize([t], max_length=length)).features for t in captions])
            live = x.detach().requires_grad_(True)
            loss = -(model.encode_image(live[None]).features @ targets.T).sum()
            for k, scale in enumerate(SCALES):
                noise = 0.05 * draws.normal(f"scale/{step}/{k}", index, x.shape)
                small = [int(32 * scale)] * 2
                down = resize(live + noise, small, InterpolationMode.BICUBIC, antialias=quirks.antialias).clamp(0, 1)
                back = resize(down, [32, 32], InterpolationMode.BICUBIC, antialias=quirks.antialias)
                loss = loss - (model.encode_image(back).features @ targets.T).sum()
            return torch.autograd.grad(loss, live)[0]

        def moved(x: Tensor, momentum: Tensor, x0=x0) -> Tensor:
            x = x + eps / 4 * momentum.sign()
            return x.min(x0 + eps).max(x0 - eps).clamp(0, 1)

        x = start("start")
        for step in range(text_steps):
            guide = model.encode_image(x[None]).features[0].detach()
            attacked = [plain_text(oracle, text, guide) for text in own]
            captions = [text for text, _ in attacked]
            slope = gradient(x, captions, step)
            momentum = slope / slope.abs().mean() + 0.9 * momentum
            x = moved(x, momentum)
        x = start("start/1")
        for step in range(text_steps, text_steps + steps):
            slope = gradient(x, captions, step)
            momentum = slope / slope.abs().mean() + 0.9 * momentum
            x = moved(x, momentum)
        images.append(x)
        texts += captions
        sources |= {known for text, (new, known) in zip(own, attacked, strict=True) if new != text}
    return torch.stack(images), texts, sources


@pytest.mark.parametrize(
    ("quirks", "text_steps"), [(Quirks(), 1), (OFFICIAL, 1), (Quirks(), 2)], ids=["correct", "official", "twice"]
)
def test_cmi_equals_the_plain_one(candidates: Neighbours, quirks: Quirks, text_steps: int) -> None:
    model, batch = tiny_clip(seed=2).eval().requires_grad_(False), words_batch()
    attack = CMI(threat=THREAT, candidates=candidates, text_steps=text_steps, steps=3, quirks=quirks, seed=5)
    result = attack(model, batch)
    images, texts, sources = plain_cmi(model, batch, quirks, text_steps=text_steps, steps=3, seed=5)
    assert list(result.texts) == texts
    assert sources == {True, False}
    # One gradient near zero may round to the other sign, and moves its neighbours in the steps after.
    assert ((result.images - images).abs() > 1e-5).float().mean() <= 0.01


def test_a_config_names_the_published_candidates(candidates: Neighbours, tmp_path: Path) -> None:
    source = {"name": "neighbours", "path": str(tmp_path / "glove.txt"), "fallback": "masked"}
    attack = build_attack(
        Component.parse({"name": "cmi", "candidates": source, "steps": 2, "parity": "official"}, ATTACKS),
        threat=THREAT,
        mlm=tiny_mlm,
        seed=5,
    )
    model, batch = tiny_clip(seed=2).eval(), words_batch()
    by_hand = CMI(threat=THREAT, candidates=candidates, steps=2, quirks=CMI.official, seed=5)
    result, expected = attack(model, batch), by_hand(model, batch)
    assert torch.equal(result.images, expected.images) and result.texts == expected.texts


def test_the_momentum_of_the_text_step_is_handed_on(candidates: Neighbours) -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch()
    with_, without = (CMI(threat=THREAT, candidates=candidates, steps=1, decay=decay) for decay in (0.9, 0.0))
    assert ((with_(model, batch).images - without(model, batch).images).abs() > 1e-5).float().mean() > 0.05


def test_splitting_a_batch_changes_nothing(candidates: Neighbours) -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch((2, 1, 3, 2))
    attack = CMI(threat=THREAT, candidates=candidates, steps=3)
    context = context_of(model, batch)
    whole = attack(model, batch, context)
    parts = [attack(model, batch.rows(a, b), context) for a, b in ((0, 1), (1, 4))]
    # Batched convolutions round differently.
    assert ((whole.images - torch.cat([part.images for part in parts])).abs() > 1e-5).float().mean() <= 0.01
    assert whole.texts == sum((part.texts for part in parts), ())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scales", [(), SCALES])
def test_both_budgets_hold_and_the_similarity_falls(candidates: Neighbours, norm, scales) -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch()
    threat = ThreatModel(eps=8 / 255 if norm == "linf" else 1.0, norm=norm, max_words=1)
    attack = CMI(threat=threat, candidates=candidates, scales=scales)
    result = attack(model, batch)
    assert result.distance.max() <= threat.eps + 1e-6 and result.distance.min() > 0.5 * threat.eps
    assert result.images.min() >= 0 and result.images.max() <= 1
    assert result.words_changed.max() == 1

    def similarity(images: Tensor, texts: tuple[str, ...]) -> Tensor:
        with torch.no_grad():
            features = model.encode_image(images).features[batch.txt2img]
        return (features * attack.sga.words.features(model, texts)).sum(1)

    assert (similarity(result.images, result.texts) < similarity(batch.images, batch.texts)).all()


def test_a_budget_of_nothing_changes_nothing(candidates: Neighbours) -> None:
    model, batch = tiny_clip(seed=2).eval(), words_batch()
    for eps, max_words in ((0, 1), (4 / 255, 0)):
        threat = ThreatModel(eps=eps, max_words=max_words)
        result = CMI(threat=threat, candidates=candidates, steps=2)(model, batch)
        assert torch.equal(result.images, batch.images) == (eps == 0)
        assert (result.texts == batch.texts) == (max_words == 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("text_steps", 0), ("step_size", -1.0), ("decay", -0.1), ("decay", float("nan"))],
)
def test_bad_arguments_are_named(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{name} must"):
        CMI(threat=THREAT, candidates=tiny_candidates(), **{name: value})
