from collections.abc import Sequence

import pytest
import torch
from tiny_mlm import tiny_captions
from transformers import CLIPConfig, CLIPModel

from fastmat.errors import UserError
from fastmat.models import hf_clip
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.open_clip import load_open_clip
from fastmat.models.protocol import TextPrefixes, TextState, TextTokens
from fastmat.models.tiny import tiny_clip
from fastmat.models.tokenizers import HashTokenizer
from fastmat.text.encoded import EncodedTexts, Representation, represent
from fastmat.text.spelling import Ids, Speller
from fastmat.types import ImageTransform


class Counting(DualEncoder):
    """Remembers the shape of every text batch: whole ones, and what continues a prefix."""

    shapes: list[tuple[int, int]]
    continued: list[tuple[int, int]]
    begun: list[int]

    def encode_text(self, tokens: TextTokens) -> TextState:
        self.shapes.append(tuple(tokens.ids.shape))
        return super().encode_text(tokens)

    def text_prefixes(self, tokens: TextTokens) -> TextPrefixes | None:
        self.begun.append(len(tokens.ids))
        return super().text_prefixes(tokens)

    def continue_text(
        self, prefixes: TextPrefixes, owner: torch.Tensor, start: torch.Tensor, ids: torch.Tensor
    ) -> TextState:
        self.continued.append(tuple(ids.shape))
        return super().continue_text(prefixes, owner, start, ids)


def counting(model: DualEncoder) -> Counting:
    model.eval().requires_grad_(False).__class__ = Counting
    model.shapes, model.continued, model.begun = [], [], []
    return model


def random_hf_clip() -> DualEncoder:
    """A CLIPModel with a causal text tower of two layers."""
    text = {"vocab_size": 80, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    ends = {"eos_token_id": 79, "bos_token_id": 78, "max_position_embeddings": 40}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**text, "num_attention_heads": 2, **ends},
        vision_config={**vision, "image_size": 32, "patch_size": 16},
        projection_dim=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(config)
        for parameter in clip.parameters():
            parameter.data.normal_(std=0.2)
    return hf_clip.take_apart(clip, Ending(64), ImageTransform(size=32))


class Ending(HashTokenizer):
    """Ends with 79, where the tower pools."""

    def frame(self, ids: Sequence[int], max_length: int) -> list[int]:
        return [78, *ids[: max_length - 2], 79]


def spelt(model: DualEncoder, texts: Sequence[str], **limit: int) -> list[Ids]:
    speller = Speller(model, **limit)
    return [speller.ids(text.split(" ")) for text in texts]


def encoder(model: DualEncoder, *parts: Representation, tokens: int | None = None) -> EncodedTexts:
    return EncodedTexts(model, parts=parts, length=model.context_length, tokens=tokens)


def one_by_one(model: DualEncoder, texts: Sequence[str], what: Representation, pad: bool = False) -> torch.Tensor:
    return torch.cat([represent(model.encode_text(model.tokenize([text], pad=pad)), what) for text in texts])


@pytest.mark.parametrize("what", ["features", "embeds", "cls", "tokens"])
@pytest.mark.parametrize("tokens", [1, 30, None])
def test_rows_are_those_of_single_texts_in_order(what: Representation, tokens: int | None) -> None:
    model = counting(tiny_clip())
    texts = [text for text in tiny_captions(30) if text.strip()]
    rows = encoder(model, what, tokens=tokens)(spelt(model, texts))[what]
    torch.testing.assert_close(rows, one_by_one(model, texts, what, pad=what == "tokens"), atol=1e-5, rtol=1e-4)
    if tokens == 1:
        assert {count for count, _ in model.shapes} == {1}


def variants(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Each word of each text replaced, or gone, or doubled; and the text that each came from."""
    found = []
    for text in texts:
        words = text.split(" ")
        for i in range(len(words)):
            found += [(" ".join([*words[:i], new, *words[i + 1 :]]), text) for new in ("bird", "", "big bird")]
    return [variant for variant, _ in found], [base for _, base in found]


@pytest.fixture(scope="module", params=["hf_clip", "open_clip"])
def causal(request: pytest.FixtureRequest) -> DualEncoder:
    """open_clip: the text tower of a library model, cut to three layers."""
    if request.param == "hf_clip":
        return random_hf_clip()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_open_clip("RN50-quickgelu")
    model.text_tower.text.transformer.resblocks = model.text_tower.text.transformer.resblocks[:3]
    return model


@pytest.mark.parametrize("tokens", [20, None])
def test_variants_of_a_caption_are_encoded_from_where_they_differ(causal: DualEncoder, tokens: int | None) -> None:
    model = counting(causal)
    texts, bases = variants(["a red dog runs in the snow", "two cats", "a red dog runs", "a " * 50 + "dog"])
    found = encoder(model, "features", "embeds", tokens=tokens)(spelt(model, texts), base=spelt(model, bases))
    assert model.shapes == []
    rows = sum(count for count, _ in model.continued)
    positions = sum(count * length for count, length in model.continued)
    assert 40 < rows <= len(set(spelt(model, texts)))
    assert positions < 0.7 * sum(map(len, set(spelt(model, texts))))
    for what in ("features", "embeds"):
        expected = one_by_one(model, texts, what)
        torch.testing.assert_close(found[what], expected, atol=2e-6 * float(expected.abs().max()) * 10, rtol=1e-5)


def test_an_end_inside_a_caption_is_where_the_tower_pools() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = counting(load_open_clip("RN50-quickgelu"))
    model.text_tower.text.transformer.resblocks = model.text_tower.text.transformer.resblocks[:2]
    texts, bases = variants(["a red <end_of_text> dog runs", "two cats"])
    found = encoder(model, "embeds")(spelt(model, texts), base=spelt(model, bases))["embeds"]
    assert model.continued and model.shapes
    expected = one_by_one(model, texts, "embeds")
    torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-5)


def test_a_base_that_is_asked_for_is_encoded_once(causal: DualEncoder) -> None:
    model = counting(causal)
    texts = ["a red dog", "a blue dog", "a red dog", "blue cat", "a blue dog"]
    bases = ["a red dog", "a red dog", "a red dog", "a blue dog", "a blue dog"]
    encoded = encoder(model, "features")
    rows = encoded(spelt(model, texts), base=spelt(model, bases))["features"]
    assert len(encoded) == 3
    torch.testing.assert_close(rows, one_by_one(model, texts, "features"))
    again = encoded(spelt(model, texts[:3]))["features"]
    assert torch.equal(again, rows[:3])
    assert torch.equal(encoded(spelt(model, texts), base=spelt(model, texts))["features"], rows)


@pytest.mark.parametrize("room", [None, 0, 12])
def test_a_beginning_is_kept_for_the_next_search(causal: DualEncoder, room: int | None) -> None:
    model = counting(causal)
    texts, bases = variants(["a red dog runs in the snow", "two cats", "a red dog runs"])
    encoded = encoder(model, "features", tokens=10)
    if room is not None:
        encoded._room = room
    first, second = slice(0, None, 2), slice(1, None, 2)
    rows = [encoded(spelt(model, texts[of]), base=spelt(model, bases[of]))["features"] for of in (first, second)]
    assert (sum(model.begun) == 3) == (room is None)
    for of, found in zip((first, second), rows, strict=True):
        torch.testing.assert_close(found, one_by_one(model, texts[of], "features"), atol=1e-5, rtol=1e-5)


def test_a_tower_that_sees_ahead_is_not_continued() -> None:
    model = counting(tiny_clip())
    texts, bases = variants(["a red dog runs in the snow"])
    rows = encoder(model, "features")(spelt(model, texts), base=spelt(model, bases))["features"]
    assert model.continued == []
    torch.testing.assert_close(rows, one_by_one(model, texts, "features"), atol=1e-5, rtol=1e-4)


def test_each_text_once_across_calls() -> None:
    model = counting(tiny_clip())
    encoded = encoder(model, "features", "embeds", tokens=12)
    first = encoded(spelt(model, ["red dog", "dog", "red dog", "a cat runs"]))
    assert sum(count for count, _ in model.shapes) == len(encoded) == 3
    again = encoded(spelt(model, ["a cat runs", "dog"]))
    assert sum(count for count, _ in model.shapes) == 3
    for part in ("features", "embeds"):
        assert torch.equal(again[part], first[part][[3, 1]])
    encoded(spelt(model, ["dog", "new"]))
    assert sum(count for count, _ in model.shapes) == len(encoded) == 4


def test_equal_ids_share_a_row() -> None:
    model = counting(tiny_clip())
    encoded = encoder(model, "features")
    rows = encoded(spelt(model, ["Red dog", "red dog", "red  dog", "red dog runs", "dog red"], max_length=4))[
        "features"
    ]
    assert len(encoded) == 2
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[3])
    assert not torch.equal(rows[0], rows[4])


def test_rows_of_one_length_stand_together_without_padding() -> None:
    model = counting(tiny_clip())
    encoder(model, "features")(spelt(model, ["a b c d e f g h", "a", "b", "h g f e d c b a"]))
    assert model.shapes == [(2, 3), (2, 10)]


def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = counting(tiny_clip())
    whole = encoder(model, "features")(spelt(model, tiny_captions(30)))["features"]
    encode = DualEncoder.encode_text

    def small_memory(self: DualEncoder, tokens: TextTokens) -> TextState:
        if tokens.ids.numel() > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, tokens)

    monkeypatch.setattr(DualEncoder, "encode_text", small_memory)
    torch.testing.assert_close(encoder(model, "features")(spelt(model, tiny_captions(30)))["features"], whole)


def test_no_token_sequence() -> None:
    state = TextState(*([torch.zeros(1)] * 2), None, torch.zeros(1, 2), torch.zeros(1, 2))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no token sequence"):
        represent(state, "cls")
