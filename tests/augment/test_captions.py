"""Which captions a step sees: counts, shares, no repeat before all were taken, the sample alone decides."""

from collections import Counter

import pytest
import torch
from batches import random_batch
from PIL import Image

from fastmat.attacks.draws import SeededDraws
from fastmat.augment.augmentation import AugmentSettings, augmentation
from fastmat.augment.captions import CaptionDraw, CaptionPool
from fastmat.data.provenance import Provenance
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError
from fastmat.types import Batch

EDA = Provenance(generator="eda", model="lexicon", source="a", seed=0)
PAINTED = Provenance(generator="text_to_image", model="sd", source="a", seed=0, made="image")


def a_set(captions: list[tuple[str, ...]], makers: list[tuple[Provenance | None, ...]]) -> RetrievalSet:
    n = len(captions)
    return RetrievalSet(
        name="tiny",
        split="train",
        captions=tuple(captions),
        ids=tuple(map(str, range(n))),
        group=tuple(range(n)),
        load=lambda row: Image.new("RGB", (4, 4)),
        provenance=tuple(makers),
    )


def batch_of(rows: list[int]) -> Batch:
    return Batch(
        images=torch.zeros(len(rows), 3, 4, 4),
        texts=tuple("brought" for _ in rows),
        txt2img=torch.arange(len(rows)),
        index=torch.tensor(rows),
        group=torch.tensor(rows) + 7,
    )


POOL = CaptionPool(
    human=(("h0", "h1", "h2"), ("k0",), ("m0", "m1", "m2", "m3", "m4"), ()),
    generated=(("g0", "g1"), ("l0", "l1", "l2"), (), ("n0",)),
)


def drawn(rows: list[int], *, number: int, generated: float, seed: int = 0) -> list[tuple[str, ...]]:
    batch = CaptionDraw(pool=POOL, number=number, generated=generated)(batch_of(rows), SeededDraws(seed))
    assert batch.txt2img.tolist() == [i for i in range(len(rows)) for _ in range(number)]
    assert batch.group.tolist() == [row + 7 for row in rows]
    return [batch.texts[i : i + number] for i in range(0, len(batch.texts), number)]


def test_who_wrote_what_comes_from_the_set() -> None:
    dataset = a_set([("h", "g"), ("for the picture",)], [(None, EDA), (PAINTED,)])
    assert CaptionPool.of(dataset) == CaptionPool(human=(("h",), ("for the picture",)), generated=(("g",), ()))
    plain = a_set([("h", "i"), ("j",)], [])
    assert CaptionPool.of(plain) == CaptionPool(human=(("h", "i"), ("j",)), generated=((), ()))


def test_an_exact_share_is_kept_in_every_step() -> None:
    for seed in range(50):
        ((*texts,),) = drawn([0], number=4, generated=0.5, seed=seed)
        assert Counter(text[0] for text in texts) == {"h": 2, "g": 2} and len(set(texts)) == 4


def test_other_shares_are_right_on_the_average_and_every_caption_comes() -> None:
    seen = Counter(text for seed in range(3000) for text in drawn([0], number=1, generated=0.3, seed=seed)[0])
    assert set(seen) == {"h0", "h1", "h2", "g0", "g1"}
    generated = (seen["g0"] + seen["g1"]) / 3000
    assert abs(generated - 0.3) < 4 * (0.3 * 0.7 / 3000) ** 0.5
    for text, share in (("h0", 0.7 / 3), ("h1", 0.7 / 3), ("h2", 0.7 / 3), ("g0", 0.15), ("g1", 0.15)):
        assert abs(seen[text] / 3000 - share) < 0.035


def test_where_one_kind_is_short_the_other_fills_and_then_captions_repeat() -> None:
    for seed in range(20):
        texts = drawn([0, 1, 2, 3], number=4, generated=0.25, seed=seed)
        assert sorted(texts[0])[1:] == ["h0", "h1", "h2"] and sorted(texts[0])[0] in ("g0", "g1")
        assert sorted(texts[1]) == ["k0", "l0", "l1", "l2"]
        assert len(set(texts[2])) == 4 and all(text.startswith("m") for text in texts[2])
        assert texts[3] == ("n0",) * 4
        human_only = drawn([0, 1], number=5, generated=0.0, seed=seed)
        assert set(human_only[0]) == {"h0", "h1", "h2", "g0", "g1"} and human_only[0][0].startswith("h")
        assert human_only[1][0] == human_only[1][4] == "k0"


def test_a_draw_depends_on_the_sample_alone() -> None:
    whole = drawn([3, 0, 2, 1], number=3, generated=0.4)
    assert drawn([3, 0], number=3, generated=0.4) + drawn([2, 1], number=3, generated=0.4) == whole
    assert drawn([1, 2, 0, 3], number=3, generated=0.4) == [whole[3], whole[2], whole[1], whole[0]]
    assert any(drawn([0], number=3, generated=0.4, seed=seed)[0] != whole[1] for seed in range(1, 9))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"number": 0}, "captions must be at least 1"),
        ({"generated": 1.5}, "share between 0 and 1"),
        ({"generated": 0.5}, "human captions only"),
    ],
)
def test_what_cannot_be_drawn(wrong, said: str) -> None:
    pool = CaptionPool(human=(("a",),), generated=((),))
    with pytest.raises(UserError, match=said):
        CaptionDraw(**{"pool": pool, "number": 1, **wrong})


def test_a_config_makes_captions_and_views() -> None:
    dataset = a_set([("h", "g"), ("i", "j")], [(None, EDA), (None, None)])
    assert augmentation(AugmentSettings(), dataset) is None
    augment = augmentation(AugmentSettings(captions=2, generated=0.5, views=2), dataset)
    assert augment is not None
    found = augment(batch_of([1, 0]), SeededDraws(0))
    assert found.images.shape == (6, 3, 4, 4) and found.group.tolist() == [8, 7, 8, 7, 8, 7]
    assert sorted(found.texts[:2]) == ["i", "j"] and sorted(found.texts[2:]) == ["g", "h"]
    assert found.text_group.tolist() == [8, 8, 7, 7]
    views_only = augmentation(AugmentSettings(views=1, keep_images=False), dataset)
    assert views_only is not None
    batch = random_batch((2, 1))
    assert views_only(batch, SeededDraws(0)).texts == batch.texts


def test_a_stream_has_views_and_no_draw_of_captions() -> None:
    assert augmentation(AugmentSettings(views=1), None) is not None
    with pytest.raises(UserError, match="not from shards; use captions_per_image"):
        augmentation(AugmentSettings(captions=2), None)


def test_a_process_makes_of_its_share_what_one_process_makes_of_the_whole() -> None:
    """The same images and captions, in another order, and equally many on each."""
    dataset = a_set([("h", "g"), ("i",), ("j", "k", "l"), ("m", "n")], [(None, EDA), (None,), (None,) * 3, (None, EDA)])
    augment = augmentation(AugmentSettings(captions=3, generated=0.5, views=2), dataset)
    assert augment is not None
    batch = batch_of([2, 0, 3, 1]).replace(images=torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    whole = augment(batch, SeededDraws(3))
    shares = [augment(batch.rows(*rows), SeededDraws(3)) for rows in ((0, 2), (2, 4))]
    assert [(len(share), len(share.texts)) for share in shares] == [(6, 6), (6, 6)]
    assert sum((share.texts for share in shares), ()) == whole.texts
    places = {int(index): row for row, index in enumerate(whole.index)}
    for share in shares:
        for row, index in enumerate(share.index.tolist()):
            assert torch.equal(share.images[row], whole.images[places[index]])
            assert share.group[row] == whole.group[places[index]]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"captions": 0}, "captions must be at least 1 or null"),
        ({"generated": 0.5}, "set captions to a number"),
        ({"views": -1}, "views must not be negative"),
        ({"keep_images": False}, "set views to 1 or more"),
        ({"views": 1, "magnitude": 2.0}, "magnitude"),
    ],
)
def test_a_config_that_makes_no_sense(wrong, said: str) -> None:
    with pytest.raises(UserError, match=said):
        AugmentSettings(**wrong)
