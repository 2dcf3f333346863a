"""The ensemble against its members, each run by itself."""

import warnings
from dataclasses import replace

import pytest
import torch
from batches import random_batch
from tiny_mlm import tiny_candidates, tiny_captions

from fastmat.attacks.alternating import Alternating
from fastmat.attacks.base import context_of, frozen, image_features, text_features
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.masking import UnreliableGradient
from fastmat.attacks.rivals import standing
from fastmat.attacks.sga import SGA
from fastmat.attacks.square import Square
from fastmat.attacks.strongest import Strongest
from fastmat.errors import UserError
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.tiny import tiny_clip
from fastmat.types import AttackContext, Batch, ThreatModel

THREAT = ThreatModel(eps=8 / 255)
SOURCE = tiny_candidates()


def setting() -> tuple[DualEncoder, Batch, AttackContext]:
    model, captions = tiny_clip().eval(), (2, 1, 3, 2)
    batch = replace(random_batch(captions), texts=tuple(tiny_captions(sum(captions), seed=4)))
    return model, batch, context_of(model, batch)


def strongest(**changes) -> Strongest:
    settings = {"threat": THREAT, "candidates": SOURCE, "steps": 3, "restarts": 1, "rounds": 2, "n_queries": 20}
    names = {"objectives": ("contrastive", "margin_t2i"), "include": ("co_attack", "square")}
    return Strongest(**{**settings, **names, **changes})


def one_text_each(texts: tuple[str, ...], batch: Batch, i: int) -> tuple[str, ...]:
    return tuple(text for text, owner in zip(texts, batch.txt2img.tolist(), strict=True) if owner == i)


def test_each_image_keeps_the_run_that_stands_best() -> None:
    model, batch, context = setting()
    attack = strongest()
    result = attack(model, batch, context)
    runs = {name: run(model, batch, context) for name, run in attack.runs.items()}
    assert list(runs) == ["contrastive", "margin_t2i", "co_attack", "square"]
    chosen = set()
    for i in range(len(batch)):
        one = batch.rows(i, i + 1)
        ranking = {}
        for name, run in runs.items():
            texts = one_text_each(run.texts, batch, i)
            features = image_features(model, run.images[i : i + 1])
            stands = standing(features, text_features(model, texts), one, context)
            ranking[name] = (round(float(stands.lost), 4), float(stands.margin))
        best = max(ranking, key=ranking.__getitem__)
        chosen.add(best)
        torch.testing.assert_close(result.images[i], runs[best].images[i])
        assert one_text_each(result.texts, batch, i) == one_text_each(runs[best].texts, batch, i)
    assert len(chosen) > 1


def test_does_not_depend_on_the_split() -> None:
    model, batch, context = setting()
    whole = strongest()(model, batch, context)
    parts = [strongest()(model, batch.rows(*rows), context) for rows in ((0, 1), (1, 4))]
    torch.testing.assert_close(torch.cat([part.images for part in parts]), whole.images, atol=1e-5, rtol=0)
    assert parts[0].texts + parts[1].texts == whole.texts


def test_an_included_attack_is_that_attack() -> None:
    model, batch, context = setting()
    result = strongest(objectives=(), include=("sga",))(model, batch, context)
    sga = SGA(threat=THREAT, candidates=SOURCE)(model, batch, context)
    assert torch.equal(result.images, sga.images) and result.texts == sga.texts


def test_every_run_there_is_makes_the_default() -> None:
    model, batch, context = setting()
    attack = Strongest(threat=THREAT, candidates=SOURCE, steps=1, restarts=1, rounds=1, n_queries=2)
    assert list(attack.runs)[:4] == ["contrastive", "margin_i2t", "margin_t2i", "cosine"]
    assert list(attack.runs)[4:] == ["sga", "co_attack", "cmi", "dra", "sa_aet", "square"]
    result = attack(model, batch.rows(0, 2), context)
    assert result.distance.max() > 0 and result.words_changed.max() == 1


def test_budget_is_that_of_the_runs() -> None:
    attack = Strongest(threat=THREAT, candidates=SOURCE)
    assert (attack.passes, attack.queries) == ((2440, 2400), 1000)
    assert strongest(objectives=("cosine",), include=()).passes == (1 + 2 + 2 * 4, 2 * 3)
    assert strongest(include=("sga",), objectives=("kl",)).queries == 0
    kinds = [type(run) for run in attack.runs.values()]
    assert kinds.count(Alternating) == 4 and kinds.count(Square) == 1


def said_by(model, attack: Strongest, times: int = 1) -> list[str]:
    _, batch, context = setting()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            attack(model, batch, context)
    return [str(entry.message) for entry in caught if entry.category is UnreliableGradient]


def test_a_plain_model_is_no_reason_to_warn() -> None:
    assert not said_by(tiny_clip().eval(), strongest())


@pytest.mark.parametrize(
    ("see", "said"),
    [
        (lambda x: x + 0.01 * torch.randn_like(x), "the model is random"),
        (lambda x: (x * 31).round() / 31, "the gradient is zero"),
    ],
)
def test_warnings_come_once(see, said: str) -> None:
    model = tiny_clip().eval()
    encode = model.encode_image
    model.encode_image = lambda x: encode(see(x))  # type: ignore[method-assign]
    messages = said_by(model, strongest(include=()), times=2)
    assert sum(said in message for message in messages) == 1
    assert len(messages) == len({message[:20] for message in messages})


def test_square_ahead_of_apgd_is_said() -> None:
    """Flat almost everywhere, with steps that only a search without gradients climbs."""
    model = tiny_clip().eval()
    encode = model.encode_image
    model.encode_image = lambda x: encode((x * 31).round() / 31)  # type: ignore[method-assign]
    messages = said_by(model, strongest(objectives=("contrastive",), include=("square",), n_queries=200))
    assert any("Square, which uses none, does better" in message for message in messages)


def test_without_words_or_without_a_radius() -> None:
    model, batch, context = setting()
    images_only = strongest(threat=replace(THREAT, max_words=0))(model, batch, context)
    assert images_only.texts == batch.texts and (images_only.distance > 0).any()
    words_only = strongest(threat=replace(THREAT, eps=0.0))(model, batch, context)
    assert torch.equal(words_only.images, batch.images) and words_only.words_changed.max() == 1


def test_members_run_on_a_frozen_model_leave_no_trace() -> None:
    model, batch, context = setting()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strongest()(model, batch, context)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with frozen(model):
        strongest().check(model, batch, context, SeededDraws(0))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"objectives": ("hinge",)}, "objectives must be some of contrastive"),
        ({"include": ("sga", "sga")}, "include must be some of sga"),
        ({"objectives": (), "include": ()}, "name at least one run"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"n_queries": 0}, "n_queries must be at least 1"),
    ],
)
def test_settings_that_make_no_ensemble_are_refused(wrong, said: str) -> None:
    with pytest.raises(UserError, match=said):
        strongest(**wrong)
