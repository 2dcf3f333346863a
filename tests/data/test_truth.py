"""Ground truths of a set's own making."""

import pytest
import torch

from fastmat.data.digits import digits_set
from fastmat.data.labelled import labelled_digits
from fastmat.data.retrieval import RetrievalSet
from fastmat.data.truth import Positives, beside_pairs, original_pairs, same_captions, truth_of
from fastmat.errors import UserError


def make(captions: list[list[str]], group: list[int]) -> RetrievalSet:
    return RetrievalSet(
        name="made",
        split="test",
        captions=tuple(map(tuple, captions)),
        ids=tuple(map(str, range(len(captions)))),
        group=tuple(group),
        load=lambda row: pytest.fail("no picture is asked for"),
    )


def lists(positives: Positives) -> dict[int, list[int]]:
    parts = positives.items.split(positives.count.tolist())
    return {query: items.tolist() for query, items in zip(positives.queries.tolist(), parts, strict=True)}


def test_original_pairs_go_by_groups() -> None:
    truth = original_pairs(make([["a", "b"], ["c"], ["d"]], [0, 1, 0]))
    assert lists(truth.captions) == {0: [0, 1, 3], 1: [2], 2: [0, 1, 3]}
    assert lists(truth.images) == {0: [0, 2], 1: [0, 2], 2: [1], 3: [0, 2]}


def test_equal_captions_match_and_do_not_spread() -> None:
    # 0 and 1 share "b", 1 and 2 share "c"; 0 and 2 have nothing in common.
    data = make([["a", "b"], ["b", "c"], ["c", "d"]], [0, 1, 2])
    truth = same_captions(dataset=data)
    assert lists(truth.captions) == {0: [0, 1, 2], 1: [1, 2, 3, 4], 2: [3, 4, 5]}
    assert lists(truth.images) == {0: [0], 1: [0, 1], 2: [0, 1], 3: [1, 2], 4: [1, 2], 5: [2]}
    assert truth.told == "10 pairs of equal captions or groups, of which 6 are original"


def test_labelled_sets_and_renderings_have_many_right_answers() -> None:
    classes = labelled_digits("test", label="colour").take(40)
    truth = same_captions(dataset=classes)
    for row, right in lists(truth.captions).items():
        assert right == [other for other in range(40) if classes.captions[other] == classes.captions[row]]
    scenes = digits_set("train").take(8)
    assert same_captions(dataset=scenes).captions.count.tolist() == [20] * 8


def test_a_truth_that_says_nothing_new_is_refused() -> None:
    with pytest.raises(UserError, match="no two images of digits/test have a caption or a group in common"):
        same_captions(dataset=digits_set("test"))


def test_the_original_pairs_of_the_same_queries_stand_beside() -> None:
    data = make([["a", "b"], ["c"], ["d"]], [0, 1, 2])
    few = truth_of([(0, 0), (0, 2), (2, 3)])
    both = beside_pairs(data, {"few": few})
    assert list(both) == ["few", "few/pairs"] and both["few"] is few
    assert lists(both["few/pairs"].captions) == {0: [0, 1], 2: [3]}
    assert lists(both["few/pairs"].images) == {0: [0], 2: [1], 3: [2]}
    assert beside_pairs(data, {}) == {}


def test_fingerprints_tell_judgements_apart() -> None:
    one, same, other = truth_of([(0, 0), (1, 1)]), truth_of([(1, 1), (0, 0), (0, 0)]), truth_of([(0, 1), (1, 1)])
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_taking_some_queries() -> None:
    positives = Positives.of(torch.tensor([3, 1, 3, 8]), torch.tensor([9, 0, 2, 4]))
    assert lists(positives.take(torch.tensor([8, 3, 5]))) == {3: [2, 9], 8: [4]}
    assert len(positives.take(torch.tensor([], dtype=torch.int64))) == 0
