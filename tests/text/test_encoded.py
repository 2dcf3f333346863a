from collections.abc import Sequence

import pytest
import torch
from tiny_mlm import tiny_captions

from fastmat.errors import UserError
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.protocol import TextState, TextTokens
from fastmat.models.tiny import tiny_clip
from fastmat.models.tokenizers import HashTokenizer
from fastmat.text.encoded import EncodedTexts, Representation, represent


class Counting(DualEncoder):
    """Remembers the shape of every text batch."""

    shapes: list[tuple[int, int]]

    def encode_text(self, tokens: TextTokens) -> TextState:
        self.shapes.append(tuple(tokens.ids.shape))
        return super().encode_text(tokens)


def counting() -> Counting:
    model = tiny_clip().eval().requires_grad_(False)
    model.__class__ = Counting
    model.shapes = []
    return model


def one_by_one(model: DualEncoder, texts: Sequence[str], what: Representation, pad: bool = False) -> torch.Tensor:
    return torch.cat([represent(model.encode_text(model.tokenize([text], pad=pad)), what) for text in texts])


@pytest.mark.parametrize("what", ["features", "embeds", "cls", "tokens"])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_rows_are_those_of_single_texts_in_order(what: Representation, chunk: int) -> None:
    model = counting()
    texts = [text for text in tiny_captions(30) if text.strip()]
    rows = EncodedTexts(parts=(what,), chunk=chunk)(model, texts)[what]
    torch.testing.assert_close(rows, one_by_one(model, texts, what, pad=what == "tokens"), atol=1e-5, rtol=1e-4)


def test_each_text_once_across_calls() -> None:
    model = counting()
    encoded = EncodedTexts(parts=("features", "embeds"), chunk=4)
    first = encoded(model, ["red dog", "dog", "red dog", "a cat runs"])
    assert sum(count for count, _ in model.shapes) == len(encoded) == 3
    again = encoded(model, ["a cat runs", "dog"])
    assert sum(count for count, _ in model.shapes) == 3
    for part in ("features", "embeds"):
        assert torch.equal(again[part], first[part][[3, 1]])
    encoded(model, ["dog", "new"])
    assert sum(count for count, _ in model.shapes) == len(encoded) == 4


def test_equal_ids_share_a_row() -> None:
    model = counting()
    encoded = EncodedTexts(parts=("features",), chunk=8, max_length=4)
    rows = encoded(model, ["Red dog", "red dog", "red  dog", "red dog runs", "dog red"])["features"]
    assert len(encoded) == 2
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[3])
    assert not torch.equal(rows[0], rows[4])


class WithoutEnd(HashTokenizer):
    def __call__(self, text: str, max_length: int) -> list[int]:
        return super().__call__(text, max_length)[:-1]


def test_texts_that_differ_in_their_last_token_alone() -> None:
    model = counting()
    model.tokenizer = WithoutEnd(64)
    rows = EncodedTexts(parts=("features",), chunk=8)(model, ["red dog", "red cat"])["features"]
    assert not torch.equal(rows[0], rows[1])


def test_short_texts_are_not_padded_to_the_longest_of_all() -> None:
    model = counting()
    EncodedTexts(parts=("features",), chunk=2)(model, ["a b c d e f g h", "a", "b", "h g f e d c b a"])
    assert model.shapes == [(2, 3), (2, 10)]


def test_prepare_comes_before_the_tokenizer() -> None:
    model = counting()
    encoded = EncodedTexts(parts=("features",), chunk=8, prepare=lambda text: text.replace("!", ""))
    encoded(model, ["dog!", "dog"])
    assert len(encoded) == 1


def test_no_token_sequence() -> None:
    state = TextState(*([torch.zeros(1)] * 2), None, torch.zeros(1, 2), torch.zeros(1, 2))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no token sequence"):
        represent(state, "cls")
