import pytest
import torch
from tiny_mlm import tiny_candidates, tiny_captions

from fastmat.attacks.base import words_changed
from fastmat.attacks.bert_attack import BertAttack
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.types import Batch, ThreatModel


def make_batch(images: int = 4) -> Batch:
    counts = [1, 3, 2, 5][:images]
    return Batch(
        images=torch.rand(images, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        texts=tuple(tiny_captions(sum(counts), seed=11)),
        txt2img=torch.arange(images).repeat_interleave(torch.tensor(counts)),
        index=torch.arange(images),
        group=torch.arange(images),
    )


def attack(max_words: int = 1, **settings) -> BertAttack:
    return BertAttack(threat=ThreatModel(max_words=max_words), candidates=tiny_candidates(threshold=1.5), **settings)


@pytest.mark.parametrize("choice", ["cosine", "kl"])
@pytest.mark.parametrize("max_words", [0, 1, 3])
@pytest.mark.parametrize("quirks", [Quirks(), Quirks.official()], ids=["correct", "official"])
def test_text_only_and_within_budget(choice: str, max_words: int, quirks: Quirks) -> None:
    batch, model = make_batch(), tiny_clip()
    result = attack(max_words, choice=choice, quirks=quirks)(model, batch)
    assert torch.equal(result.images, batch.images)
    assert int(result.words_changed.max()) == max_words
    assert result.words_changed.tolist() == [
        words_changed(*pair) for pair in zip(batch.texts, result.texts, strict=True)
    ]


def test_default_moves_captions_away_from_their_own_image() -> None:
    batch, model = make_batch(), tiny_clip()
    found = attack()(model, batch).texts
    with torch.no_grad():
        images = model.encode_image(batch.images).features[batch.txt2img]
        before, after = ((model.encode_text(model.tokenize(t)).features * images).sum(1) for t in (batch.texts, found))
    assert bool((after <= before + 1e-6).all())
    assert float((before - after).mean()) > 0.01


def test_splitting_the_batch_changes_nothing() -> None:
    batch, model = make_batch(), tiny_clip()
    whole = attack()(model, batch).texts
    parts = [attack()(model, batch.rows(i, i + 1)).texts for i in range(len(batch))]
    assert tuple(text for part in parts for text in part) == whole


def test_no_trace_in_the_model() -> None:
    batch, model = make_batch(), tiny_clip().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attack()(model, batch)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_defaults_are_the_published_constants() -> None:
    for choice, representation in (("cosine", "features"), ("kl", "embeds")):
        words = BertAttack(threat=ThreatModel(max_words=2), candidates=tiny_candidates(), choice=choice).words
        assert (words.max_words, words.beam, words.choice) == (2, 1, choice)
        assert words.importance == words.judged == representation
