"""Image and words in turn against a plain loop, one image at a time and every substitution by itself."""

from dataclasses import replace

import pytest
import torch
from batches import random_batch
from tiny_mlm import tiny_candidates, tiny_captions

from fastmat.attacks.alternating import Alternating, some
from fastmat.attacks.apgd import ascend_adaptively, farthest_start
from fastmat.attacks.base import context_of, frozen, image_features, text_features
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.objectives import CosineToOwn
from fastmat.attacks.rivals import Rivals
from fastmat.attacks.sga import SGA
from fastmat.errors import UserError
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.types import AttackContext, Batch, ThreatModel

THREAT = ThreatModel(eps=16 / 255)
SOURCE = tiny_candidates()


def setting(captions=(2, 1, 3, 2, 1, 2)) -> tuple[DualEncoder, Batch, AttackContext]:
    model = tiny_clip().eval()
    batch = replace(random_batch(captions), texts=tuple(tiny_captions(sum(captions), seed=4)))
    return model, batch, context_of(model, batch)


def attack(**changes) -> Alternating:
    return Alternating(**{"threat": THREAT, "candidates": SOURCE, "steps": 4, "restarts": 2, "rounds": 3, **changes})


def standing_by_hand(model, x: torch.Tensor, texts: list[str], group: int, context: AttackContext):
    """(lost queries, margin) of one image."""
    image = image_features(model, x[None])[0]
    captions = text_features(model, texts)
    tr = max((context.text_features @ image)[context.text_group != group].tolist()) - float((captions @ image).max())
    ir = [
        max((context.image_features @ text)[context.image_group != group].tolist()) - float(text @ image)
        for text in captions
    ]
    return (tr >= 0) + sum(m >= 0 for m in ir) / len(ir), (tr + sum(ir) / len(ir)) / 2


def every_substitution(text: str) -> list[str]:
    (found,) = SOURCE([text], quirks=Quirks())
    words = text.split(" ")
    return [text, *(" ".join([*words[:i], new, *words[i + 1 :]]) for i, of in found.items() for new in of)]


def plain(model, batch: Batch, context: AttackContext, *, steps: int, restarts: int, rounds: int):
    """One image: the loop of the docstring, texts encoded one by one."""
    clean, draws = list(batch.texts), SeededDraws(0)
    best, texts, group = batch.images, clean, int(batch.group[0])
    stands = standing_by_hand(model, best[0], texts, group, context)
    for turn in range(rounds):
        value = Rivals().bind(model, batch.replace(texts=tuple(texts)), context)
        tries = []
        for restart in range(restarts):
            start = best if turn and not restart else farthest_start(batch, THREAT, draws, turn * restarts + restart)
            tries.append(
                ascend_adaptively(
                    lambda x, value=value: value(model.encode_image(x)), batch.images, start, threat=THREAT, steps=steps
                )
            )
        x = max(tries, key=lambda found: float(found[1]))[0]
        image = image_features(model, x)[0]
        straight, aside = [], []
        for text in clean:
            own = text_features(model, [text])[0]
            rivals = context.image_features[context.image_group != group]
            wrong = rivals[(rivals @ own).argmax()]
            options = every_substitution(text)
            encoded = torch.cat([text_features(model, [option]) for option in options])
            straight.append(options[int((encoded @ image).argmin())])
            aside.append(options[int((encoded @ (image - wrong)).argmin())])
        before = texts
        choices = [
            (standing_by_hand(model, x[0], option, group, context), option) for option in (texts, straight, aside)
        ]
        lost, option = max(choices, key=lambda choice: choice[0])
        if lost > stands:
            stands, best, texts = lost, x, option
        if texts == before:
            break
    return best, tuple(texts), turn + 1


def test_equals_the_plain_loop() -> None:
    model, batch, context = setting()
    result = attack()(model, batch, context)
    turns = []
    for i in range(len(batch)):
        one = batch.rows(i, i + 1)
        with frozen(model):
            images, texts, turn = plain(model, one, context, steps=4, restarts=2, rounds=3)
        turns.append(turn)
        torch.testing.assert_close(result.images[i : i + 1], images, atol=1e-5, rtol=0)
        assert tuple(t for t, o in zip(result.texts, batch.txt2img.tolist(), strict=True) if o == i) == texts
    assert min(turns) < max(turns)  # some images go on while others are done


@pytest.mark.parametrize("cut", [1, 4])
def test_does_not_depend_on_the_split(cut: int) -> None:
    model, batch, context = setting()
    whole = attack()(model, batch, context)
    parts = [attack()(model, batch.rows(*rows), context) for rows in ((0, cut), (cut, len(batch)))]
    torch.testing.assert_close(torch.cat([part.images for part in parts]), whole.images, atol=1e-5, rtol=0)
    assert parts[0].texts + parts[1].texts == whole.texts


def test_more_rounds_never_stand_worse_and_sometimes_better() -> None:
    model, batch, context = setting()
    stands = []
    for rounds in (1, 4):
        result = attack(rounds=rounds)(model, batch, context)
        owner = batch.txt2img.tolist()
        own = [[t for t, o in zip(result.texts, owner, strict=True) if o == i] for i in range(len(batch))]
        rows = zip(result.images, own, batch.group.tolist(), strict=True)
        stands.append([standing_by_hand(model, *row, context) for row in rows])
    pairs = list(zip(*stands, strict=True))
    assert all(later[0] > first[0] or later[1] > first[1] - 1e-5 for first, later in pairs)
    assert any(later > first for first, later in pairs)


def test_passes_are_what_is_counted() -> None:
    model, batch, context = setting()
    counted = {"forward": 0, "backward": 0}
    encode = model.encode_image

    def counting(images: torch.Tensor):
        counted["forward"] += len(images)
        if images.requires_grad:
            counted["backward"] += len(images)
        return encode(images)

    model.encode_image = counting  # type: ignore[method-assign]
    one = attack(rounds=1)
    one(model, batch, context)
    forwards, backwards = one.passes
    assert (counted["forward"], counted["backward"]) == (forwards * len(batch), backwards * len(batch))
    counted.update(forward=0, backward=0)
    three = attack()
    three(model, batch, context)
    assert forwards * len(batch) < counted["forward"] <= three.passes[0] * len(batch)
    assert backwards * len(batch) < counted["backward"] <= three.passes[1] * len(batch)


def test_budgets_of_one_side() -> None:
    model, batch, context = setting()
    images_only = attack(threat=replace(THREAT, max_words=0))(model, batch, context)
    assert images_only.texts == batch.texts and images_only.distance.max() > 0
    words_only = attack(threat=replace(THREAT, eps=0.0), objective=CosineToOwn())(model, batch, context)
    assert torch.equal(words_only.images, batch.images) and words_only.words_changed.max() == 1


def test_two_words_are_within_budget_and_stand_no_worse_than_sga() -> None:
    model, batch, context = setting()
    threat = replace(THREAT, max_words=2)
    result = attack(threat=threat)(model, batch, context)
    sga = SGA(threat=threat, candidates=SOURCE, steps=4)(model, batch, context)
    owner = batch.txt2img.tolist()

    def lost(found) -> float:
        own = [[t for t, o in zip(found.texts, owner, strict=True) if o == i] for i in range(len(batch))]
        rows = zip(found.images, own, batch.group.tolist(), strict=True)
        return sum(standing_by_hand(model, *row, context)[0] for row in rows)

    assert result.words_changed.max() == 2
    assert lost(result) >= lost(sga)


def test_settings_that_make_no_run_are_refused() -> None:
    for wrong, said in (({"rounds": 0}, "rounds"), ({"restarts": 0}, "restarts"), ({"steps": 0}, "steps")):
        with pytest.raises(UserError, match=f"{said} must be at least 1"):
            attack(**wrong)


def test_some_images_of_a_batch() -> None:
    batch = random_batch((2, 1, 3, 2))
    part = some(batch, torch.tensor([1, 3]))
    assert part.texts == (batch.texts[2], *batch.texts[6:]) and part.txt2img.tolist() == [0, 1, 1]
    assert torch.equal(part.images, batch.images[[1, 3]]) and part.index.tolist() == [11, 13]
