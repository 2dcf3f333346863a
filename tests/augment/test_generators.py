"""The generators that are models, run with tiny random ones: what goes in, what comes out, and that it repeats."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_generators import WORDS, save_captioner, save_language_model, save_painter, save_translator
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

from fastmat.augment import text_to_image
from fastmat.augment.back_translation import BackTranslation
from fastmat.augment.captioning import Captioning
from fastmat.augment.offline import Generator, Request
from fastmat.augment.rewrite import Rewrite
from fastmat.augment.text_to_image import TextToImage
from fastmat.errors import UserError
from fastmat.models.weights import weights_hash

CAPTIONS = ("a red dog runs", "the black cat sits in the park")


def requests(*, seed: int = 0, captions: tuple[str, ...] = CAPTIONS) -> list[Request]:
    return [
        Request(
            image_id=str(i),
            caption=caption,
            load=lambda i=i: Image.new("RGB", (40, 30), (90 * i, 10, 200)),
            copy=0,
            seed=seed + i,
        )
        for i, caption in enumerate(captions)
    ]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def translators(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("translators")
    return str(save_translator(folder / "en-de", seed=1)), str(save_translator(folder / "de-en", seed=2))


def sampled_twice(generator: Generator) -> list[str]:
    """What it answers: the same again, other for another seed, and nothing of it moves the global stream."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = generator(requests())
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert generator(requests()) == first
    assert any(generator(requests(seed=seed)) != first for seed in range(10, 14))
    assert isinstance(generator, Generator)
    return list(first)  # type: ignore[arg-type]


def test_back_translation_goes_there_and_back(translators: tuple[str, str]) -> None:
    there, back = translators
    answers = sampled_twice(BackTranslation(there=there, back=back, max_new_tokens=8))
    assert len(answers) == 2 and {word for answer in answers for word in answer.split()} <= set(WORDS)

    # the likeliest words, one model after the other, one caption at a time
    expected = []
    for text in CAPTIONS:
        for folder in translators:
            model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
            ids = tokenizer([text], return_tensors="pt").input_ids
            out = torch.tensor([[model.config.decoder_start_token_id]])
            for step in range(8):
                logits = model(input_ids=ids, decoder_input_ids=out).logits[0, -1]
                token = 2 if step == 7 else int(logits.argmax())  # this model's last token is forced to be the end
                out = torch.cat([out, torch.tensor([[token]])], 1)
                if token == 2:
                    break
            text = tokenizer.decode(out[0], skip_special_tokens=True).strip()
        expected.append(text)
    generator = BackTranslation(there=there, back=back, max_new_tokens=8, temperature=0)
    assert generator(requests()) == expected
    hashes = [weights_hash(AutoModelForSeq2SeqLM.from_pretrained(folder))[:16] for folder in translators]
    assert generator.model == f"en-de sha256:{hashes[0]} de-en sha256:{hashes[1]}"


@pytest.mark.parametrize("chat", [False, True])
def test_rewriting_asks_with_the_prompt_and_takes_the_answer(tmp_path: Path, chat: bool) -> None:
    folder = save_language_model(tmp_path / "lm", chat=chat)
    generator = Rewrite(model=str(folder), prompt="words : {caption} other words", max_new_tokens=6)
    answers = sampled_twice(generator)
    assert {word for answer in answers for word in answer.split()} <= set(WORDS) and generator.name == "rewrite"
    plain = "words : a {red} dog other words"
    assert generator.asked("a {red} dog") == (f"<s> {plain} </s>" if chat else plain)
    # a caption's answer is the same alone and padded beside a longer one
    likeliest = Rewrite(model=str(folder), prompt="words : {caption} other", max_new_tokens=6, temperature=0)
    together = likeliest(requests())
    assert together == [likeliest([request])[0] for request in requests()]


def test_captioning_reads_the_picture_alone(tmp_path: Path) -> None:
    folder = str(save_captioner(tmp_path / "blip"))
    generator = Captioning(model=folder, max_new_tokens=8)
    assert generator.per == "image"
    assert all(sampled_twice(generator))
    others = requests(captions=("other words", "a ball"))
    assert generator(others) == generator(requests())
    likeliest = Captioning(model=folder, max_new_tokens=8, temperature=0)
    one, other = likeliest(requests())
    assert likeliest(requests()[1:]) == [other] and one


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
def test_a_painted_image_depends_on_its_caption_and_seed_alone(tmp_path: Path) -> None:
    generator = TextToImage(model=str(save_painter(tmp_path / "sd")), steps=2)
    images = generator(requests())
    assert isinstance(generator, Generator) and [image.size for image in images if image] == [(16, 16)] * 2
    alone = generator(requests()[1:])
    assert images[1] is not None and alone[0] is not None
    difference = [abs(a - b) for a, b in zip(images[1].tobytes(), alone[0].tobytes(), strict=True)]
    assert max(difference) <= 1  # rounding, of a batch of one and of two
    assert generator(requests(seed=9))[0].tobytes() != images[0].tobytes()  # type: ignore[union-attr]
    larger = TextToImage(model=str(tmp_path / "sd"), steps=1, size=32)(requests()[:1])
    assert larger[0] is not None and larger[0].size == (32, 32)
    assert generator.model.startswith("sd sha256:")


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install fastmat-vlm\[augment\]"):
        text_to_image.load_pipeline("anything")


def test_what_is_no_model_is_said_in_a_sentence(tmp_path: Path, translators: tuple[str, str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    for make in (
        lambda: BackTranslation(there=translators[0], back=str(tmp_path)),
        lambda: Rewrite(model=str(tmp_path)),
        lambda: Captioning(model=str(tmp_path)),
        lambda: Captioning(model=translators[0]),
    ):
        with pytest.raises(UserError, match="could not be loaded as AutoModel") as raised:
            make()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompt": "say it again"}, "{caption}"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_values_out_of_range(wrong, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Rewrite(model="nowhere", **wrong)
    with pytest.raises(UserError, match="steps"):
        TextToImage(model="nowhere", steps=0)
