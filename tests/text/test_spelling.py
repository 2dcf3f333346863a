"""Spliced ids are those of the whole text, whatever stands in it."""

import random
from collections.abc import Sequence

import pytest
from open_clip.tokenizer import SimpleTokenizer
from tiny_mlm import tiny_captions, tiny_mlm, tiny_parts
from transformers import CLIPTokenizer

from fastmat.models.hf_clip import TransformersTokenizer
from fastmat.models.protocol import Tokenizer
from fastmat.models.tiny import tiny_clip
from fastmat.models.tokenizers import ClipTokenizer, HashTokenizer, WordPieceTokenizer, WordTokenizer
from fastmat.text.spelling import RoundTrip, Speller

ODD = [
    *["'", "''", "'s", "n't", "don't", "dog's", "dogs'", "'m", "it 's", ".", "..", "!", "?!", ",", "dog.", ".5", "a,b"],
    *["", "-", "--", "t-shirt", "(dog)", '"dog"', "&", "&amp;", "a&b", "[UNK]", "[PAD]", "[SEP]", "x[CLS]", "[MASK]"],
    *[
        "café",
        "狗",
        "🐕",
        "ﬁsh",
        "İ",
        "Σας",
        "\ud83d",
        "dog\tcat",
        "a\nb",
        "\x1b[31m",
        "<end_of_text>",
        "<b>",
        "3.5",
        "#1",
    ],
    *["big dog", "a dog .", "dog '", "' s", "the", "Dog", "x" * 40],
]


def model_with(tokenizer: Tokenizer):
    model = tiny_clip()
    model.tokenizer = tokenizer
    return model


def hub_clip() -> TransformersTokenizer:
    """transformers' own CLIP tokenizer with a vocabulary made on the spot."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {
        piece: i for i, piece in enumerate([*letters, *(f"{letter}</w>" for letter in letters), "do", "dog</w>"])
    }
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    wrapped = CLIPTokenizer(vocab=vocabulary, merges=[("d", "o"), ("do", "g</w>")])
    return TransformersTokenizer(wrapped)


TOKENIZERS = {
    "clip": lambda: ClipTokenizer(SimpleTokenizer(context_length=32)),
    "hub": hub_clip,
    "bert": lambda: WordPieceTokenizer(tiny_parts()[1]),
    "albef": lambda: WordPieceTokenizer(tiny_parts()[1], append_sep=False),
    "words": lambda: WordTokenizer(["dog", "cat", "."]),
    "hash": lambda: HashTokenizer(500),
}


def captions(count: int, seed: int) -> list[list[str]]:
    draw = random.Random(seed)
    plain = [word for caption in tiny_captions(40) for word in caption.split(" ")]
    return [[draw.choice(draw.choice([ODD, plain, plain])) for _ in range(draw.randint(1, 12))] for _ in range(count)]


def speller(name: str, trip: bool, max_length: int | None = None) -> Speller:
    model = model_with(TOKENIZERS[name]())
    back = RoundTrip(mlm=tiny_mlm(), append_sep=name != "albef", max_length=max_length or 64) if trip else None
    return Speller(model, max_length=None if trip else max_length, trip=back)


def whole(of: Speller, words: Sequence[str]) -> tuple[int, ...]:
    text = " ".join(words)
    return tuple(of.tokenizer(text if of.trip is None else of.trip(text), of.max_length))


@pytest.mark.parametrize("max_length", [None, 9])
@pytest.mark.parametrize("trip", [False, True], ids=["direct", "round trip"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_equals_tokenising_the_whole_text(name: str, trip: bool, max_length: int | None) -> None:
    of = speller(name, trip, max_length)
    spliced = 0
    for words in captions(150, seed=len(name)):
        before = of.retokenised
        assert of.ids(words) == whole(of, words), words
        spliced += of.retokenised == before
    assert spliced > 20


@pytest.mark.parametrize("trip", [False, True], ids=["direct", "round trip"])
@pytest.mark.parametrize("name", ["clip", "bert"])
def test_every_variant_equals_tokenising_it(name: str, trip: bool) -> None:
    of = speller(name, trip)
    for words in captions(12, seed=5):
        for i in range(len(words)):
            expected = [whole(of, [*words[:i], new, *words[i + 1 :]]) for new in ODD]
            assert of.variants(words, i, ODD) == expected


@pytest.mark.parametrize("trip", [False, True], ids=["direct", "round trip"])
def test_plain_captions_are_never_tokenised_again(trip: bool) -> None:
    of = speller("clip", trip)
    for text in ("a red dog runs in the snow .", "the man , the dogs and a redder cat .", "water sits"):
        words = text.split(" ")
        of.ids(words)
        for i in range(len(words) - 1):
            of.variants(words, i, ["dog", "blue cat", "catballer"])
    assert of.retokenised == 0
