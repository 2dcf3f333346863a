"""ECCV Caption and CxC in their own formats, joined with sets that have no ids of captions."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fastmat.data.captions import CaptionRule, preprocess
from fastmat.data.coco_ids import coco_ids
from fastmat.data.cxc import read_cxc
from fastmat.data.eccv_caption import read_eccv_caption
from fastmat.data.retrieval import RetrievalSet
from fastmat.data.truth import Positives, Truth
from fastmat.errors import UserError

# COCO's id of an image: ids and texts of its captions. Image 30 has a sixth caption, 32, which nobody judged.
CAPTIONS: dict[int, dict[int, str]] = {
    10: {14: "A man's red-hot pan. ", 11: "Two men, one pan!", 12: "the pan", 13: "pans", 15: "a frying pan"},
    20: {21: "A dog (small).", 23: "Dog  runs", 22: "a dog", 25: "dogs", 24: "one dog"},
    30: {31: "a dog", 32: "unjudged dog", 33: "it sits", 34: "sitting", 35: "brown", 36: "a dog sits"},
}
IMAGES = {"10": [14, 11, 12, 13, 15, 21], "30": [31, 33, 34, 35, 36, 22, 23]}
TEXTS = {"22": [20, 30], "12": [10], "31": [30, 20]}
ORIGINAL = {str(image): [key for key in own if key != 32] for image, own in CAPTIONS.items()}
RATINGS = [
    *(
        (caption, image, 2.0 if caption == 13 else 4.9, "c2i_original")
        for image, own in ORIGINAL.items()
        for caption in own
    ),
    (22, 30, 3.0, "c2i_intrasim"),
    (31, 20, 2.99, "c2i_intrasim"),
    (14, 20, 3.5, "c2i_intrasim"),
]


def coco(rule: CaptionRule = "none", images: Sequence[int] = (30, 10, 20), **changes: object) -> RetrievalSet:
    """The field's list: another order of images, captions as COCO's file has them, no ids of captions."""
    made = RetrievalSet(
        name="coco",
        split="test",
        captions=tuple(tuple(preprocess(text, rule) for text in CAPTIONS[image].values()) for image in images),
        ids=tuple(f"val2014/COCO_val2014_{image:012d}.jpg" for image in images),
        group=tuple(range(len(images))),
        load=lambda row: pytest.fail("no picture is asked for"),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Files:
    """The public files, in a folder."""

    folder: Path

    @property
    def captions(self) -> Path:
        return self.folder / "captions_val2014.json"

    def write(self, name: str, content: object) -> Path:
        (self.folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return self.folder / name

    def eccv(self, dataset: RetrievalSet, *, partial: bool = False) -> Truth:
        return read_eccv_caption(folder=self.folder, captions=self.captions, dataset=dataset, partial=partial)

    def cxc(self, dataset: RetrievalSet, *, partial: bool = False, keep_original: bool = True) -> Truth:
        ratings = self.folder / "sits_test.csv"
        return read_cxc(
            ratings=ratings, captions=self.captions, dataset=dataset, partial=partial, keep_original=keep_original
        )


def csv_of(ratings: Sequence[tuple[object, ...]]) -> str:
    lines = ["caption,image,agg_score,sampling_method"]
    for caption, image, score, method in ratings:
        lines.append(f"COCO_val2014:sentid:{caption},COCO_val2014_{int(str(image)):012d}.jpg,{score},{method}")
    return "\n".join(lines) + "\n"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = Files(tmp_path)
    rows = [{"image_id": i, "id": c, "caption": text} for i, own in CAPTIONS.items() for c, text in own.items()]
    more = {"image_id": 99, "id": 990, "caption": "of another split"}
    made.write("captions_val2014.json", {"info": {}, "images": [], "annotations": [*sorted(rows, key=str), more]})
    made.write("eccv_image_to_caption.json", IMAGES)
    made.write("eccv_caption_to_image.json", TEXTS)
    made.write("original_image_to_caption.json", ORIGINAL)
    made.write("sits_test.csv", csv_of(RATINGS))
    return made


def in_ids(truth: Truth, dataset: RetrievalSet) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """Image to captions and caption to images, in COCO's ids, told by the texts and not by the reader."""
    images = [int(name[-16:-4]) for name in dataset.ids]
    captions = [key for image in images for key in CAPTIONS[image]]

    def lists(positives: Positives, queries: list[int], items: list[int]) -> dict[int, set[int]]:
        parts = positives.items.split(positives.count.tolist())
        return {
            queries[q]: {items[i] for i in p.tolist()} for q, p in zip(positives.queries.tolist(), parts, strict=True)
        }

    return lists(truth.captions, images, captions), lists(truth.images, captions, images)


@pytest.mark.parametrize("rule", ["none", "albef", "blip"])
def test_eccv_caption(files: Files, rule: CaptionRule) -> None:
    truth = files.eccv(coco(rule))
    images, texts = in_ids(truth, coco(rule))
    assert images == {
        10: set(IMAGES["10"]),
        30: {*IMAGES["30"], 32},
    }  # the caption that nobody judged fits its own image
    assert texts == {int(key): set(right) for key, right in TEXTS.items()}
    assert truth.told == (
        "2 images with 14 right captions, 3 captions with 5 right images; 0 of 18 judgements left out, "
        "1 captions not judged"
    )


def test_cxc_counts_from_three_on_and_keeps_the_original_pairs(files: Files) -> None:
    images, texts = in_ids(files.cxc(coco("albef")), coco())
    own = {int(image): set(right) for image, right in ORIGINAL.items()}
    assert images == {10: own[10], 20: {*own[20], 14}, 30: {*own[30], 22, 32}}
    assert texts[14] == {10, 20} and texts[22] == {20, 30} and texts[31] == {30} and texts[13] == {10}
    images, texts = in_ids(files.cxc(coco("albef"), keep_original=False), coco())
    assert images[10] == own[10] - {13} and 13 not in texts


def test_a_sixth_caption_queries_nothing(files: Files) -> None:
    place = coco().captions[0].index("unjudged dog")
    assert place not in files.cxc(coco()).images.queries.tolist()
    assert place in files.cxc(coco()).captions.items.tolist()


def test_karpathy_s_file_joins_as_well(files: Files) -> None:
    images = [
        {"cocoid": image, "sentences": [{"sentid": key, "raw": text} for key, text in own.items()]}
        for image, own in CAPTIONS.items()
    ]
    path = files.write("dataset_coco.json", {"dataset": "coco", "images": images})
    by_text = read_eccv_caption(folder=files.folder, captions=path, dataset=coco("blip"))
    assert by_text.fingerprint() == files.eccv(coco("blip")).fingerprint()


def test_captions_that_read_the_same_have_an_id_each(files: Files) -> None:
    twice = {"annotations": [{"image_id": 20, "id": key, "caption": "A dog."} for key in (9, 7, 8)]}
    path = files.write("twice.json", twice)
    ids = coco_ids(coco(ids=("20",), captions=(("a dog", "a dog"),), group=(0,)), path)
    assert ids.caption == {7: 0, 8: 1} and ids.image == {20: 0} and ids.owner == [0, 0]


def test_a_part_of_the_split_has_to_be_asked_for(files: Files) -> None:
    part = coco(images=[30, 20])
    with pytest.raises(UserError, match=r"8 of 18 judgements in .* coco/test does not have; set partial: true"):
        files.eccv(replace(part, captions=(part.captions[0][:5], part.captions[1])))
    images, texts = in_ids(files.eccv(part, partial=True), part)
    assert images == {30: {*IMAGES["30"], 32}} and texts == {22: {20, 30}, 31: {20, 30}}
    assert "7 of 18 judgements left out" in files.eccv(part, partial=True).told


def test_what_the_files_themselves_never_judged_may_be_missing(files: Files) -> None:
    files.write("eccv_image_to_caption.json", {**IMAGES, "10": [*IMAGES["10"], 990]})
    assert "1 of 19 judgements left out" in files.eccv(coco()).told


Refused = tuple[Callable[[Files], object], Callable[[Files], object], str]
NOTHING: Callable[[Files], object] = lambda files: None  # noqa: E731
REFUSED: dict[str, Refused] = {
    "other captions": (
        NOTHING,
        lambda files: files.eccv(coco(captions=(("what",) * 6, *coco().captions[1:]))),
        r"6 of 16 captions of coco/test are not in .*captions_val2014.json \(the first: image 30, 'what'\)",
    ),
    "ids that are no numbers": (
        NOTHING,
        lambda files: files.cxc(coco(ids=("a", "b.jpg", "c"))),
        "image 'a' of coco/test ends in no number",
    ),
    "one id twice": (
        NOTHING,
        lambda files: files.cxc(coco(ids=("a/10.jpg", "b/10.jpg", "30"), captions=(coco().captions[1],) * 3)),
        "images 'a/10.jpg' and 'b/10.jpg' would have the same COCO id, 10",
    ),
    "another split": (
        lambda files: files.write("original_image_to_caption.json", {"77": [770]}),
        lambda files: files.eccv(coco()),
        "judges no image of coco/test: it is of another set or split",
    ),
    "an image that was not judged": (
        lambda files: files.write("sits_test.csv", csv_of([row for row in RATINGS if str(row[1]) != "20"])),
        lambda files: files.cxc(coco()),
        r"does not judge 1 of the 3 images of coco/test \(the first: 20\)",
    ),
    "a query without an answer": (
        lambda files: files.write("eccv_caption_to_image.json", {**TEXTS, "14": []}),
        lambda files: files.eccv(coco()),
        r"nothing is right for 14 \(1 such queries\)",
    ),
    "no image query": (
        lambda files: files.write("eccv_image_to_caption.json", {"10": [14]}),
        lambda files: files.eccv(coco(images=[30, 20]), partial=True),
        "judges no image of coco/test as a query",
    ),
    "an empty truth": (
        lambda files: files.write("eccv_image_to_caption.json", {}),
        lambda files: files.eccv(coco()),
        r"eccv_image_to_caption.json: expected \{\"id\": \[ids\], ...\} with at least one query",
    ),
    "ratings below the threshold": (
        lambda files: files.write("sits_test.csv", csv_of([(22, 30, 1.0, "c2i_intrasim")])),
        lambda files: files.cxc(coco()),
        "no pair is rated 3 or more; lower threshold",
    ),
    "a missing file": (
        lambda files: (files.folder / "eccv_caption_to_image.json").unlink(),
        lambda files: files.eccv(coco()),
        "eccv_caption_to_image.json: no such file; expected ids of right items",
    ),
    "missing ratings": (
        lambda files: (files.folder / "sits_test.csv").unlink(),
        lambda files: files.cxc(coco()),
        "sits_test.csv: no such file; expected ratings",
    ),
    "a list instead of a mapping": (
        lambda files: files.write("eccv_caption_to_image.json", [1, 2]),
        lambda files: files.eccv(coco()),
        r"expected \{\"id\": \[ids\]",
    ),
    "no list of ids": (
        lambda files: files.write("eccv_caption_to_image.json", {"22": 20}),
        lambda files: files.eccv(coco()),
        "expected a list of ids for every query, got 20",
    ),
    "no id": (
        lambda files: files.write("eccv_caption_to_image.json", {"22": ["x"]}),
        lambda files: files.eccv(coco()),
        "an id must be a whole number, got 'x'",
    ),
    "raw ratings": (
        lambda files: files.write("sits_test.csv", "caption,image,score\n"),
        lambda files: files.cxc(coco()),
        "the first line must be caption,image,agg_score,sampling_method",
    ),
    "image pairs": (
        lambda files: files.write("sits_test.csv", csv_of(RATINGS) + "COCO_1.jpg,COCO_2.jpg,3.6,i2i_csim\n"),
        lambda files: files.cxc(coco()),
        r"sits_test.csv, line 20: expected caption,image",
    ),
    "no number": (
        lambda files: files.write("sits_test.csv", csv_of([(22, 30, "good", "c2i_intrasim")])),
        lambda files: files.cxc(coco()),
        "sits_test.csv, line 2: expected",
    ),
    "captions in another form": (
        lambda files: files.write("captions_val2014.json", [{"image": "a", "caption": "b"}]),
        lambda files: files.eccv(coco()),
        "captions_val2014.json: expected an object with 'images'",
    ),
    "captions that are no JSON": (
        lambda files: files.write("captions_val2014.json", "{"),
        lambda files: files.eccv(coco()),
        "captions_val2014.json: not JSON at line 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(files: Files, case: str) -> None:
    prepare, read, message = REFUSED[case]
    prepare(files)
    with pytest.raises(UserError, match=message) as refused:
        read(files)
    assert "\n" not in str(refused.value)
