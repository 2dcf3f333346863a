from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM, BertTokenizer

from fastmat.data.digits import digits_set
from fastmat.data.digits_text import COLOURS, DIGITS
from fastmat.errors import UserError
from fastmat.training.mlm import IGNORED, SPECIAL, mask_words, train_mlm, word_tokenizer


def captions(split: str) -> list[str]:
    return [c for own in dict.fromkeys(digits_set(split).captions) for c in own]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mlm") / "model"
    train_mlm(captions("train"), out, seed=0, steps=200)
    return out


def load(folder: Path) -> tuple[BertForMaskedLM, BertTokenizer]:
    return BertForMaskedLM.from_pretrained(folder).eval(), BertTokenizer.from_pretrained(folder)


@torch.no_grad()
def test_masked_words_of_unseen_captions_are_guessed(folder: Path) -> None:
    model, tokenizer = load(folder)
    batch = tokenizer(captions("test"), padding=True, return_tensors="pt")
    chosen = (torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(1)) < 0.15) & (
        batch["input_ids"] >= len(SPECIAL)
    )
    masked = batch["input_ids"].masked_fill(chosen, tokenizer.mask_token_id)
    guess = model(input_ids=masked, attention_mask=batch["attention_mask"]).logits.argmax(-1)
    assert (guess == batch["input_ids"])[chosen].float().mean() > 0.35  # always saying "the" scores about 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", [DIGITS, COLOURS, ("digit", "number", "numeral", "figure")])
def test_words_of_one_kind_are_one_anothers_candidates(folder: Path, kind: tuple[str, ...]) -> None:
    """On unmasked captions, as the text attack reads the model."""
    model, tokenizer = load(folder)
    batch = tokenizer(captions("test")[:200], padding=True, return_tensors="pt")
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(kind)))
    here = torch.isin(batch["input_ids"], ids)
    top = model(**batch).logits[here].topk(len(kind)).indices
    assert torch.isin(top, ids).float().mean() > 0.8


def test_one_piece_per_word(folder: Path) -> None:
    _, tokenizer = load(folder)
    for caption in captions("train")[:500]:
        assert tokenizer.tokenize(caption.upper()) == caption.split()
    assert tokenizer.tokenize("dog") == ["[UNK]"]
    assert tokenizer("red", add_special_tokens=True)["input_ids"] == tokenizer.convert_tokens_to_ids(
        ["[CLS]", "red", "[SEP]"]
    )


def test_words_are_split_as_bert_splits_them() -> None:
    tokenizer = word_tokenizer(["A man's T-shirt, Café."])
    words = ["'", ",", "-", ".", "a", "cafe", "man", "s", "shirt", "t"]
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == [*SPECIAL, *words]


def test_masking_follows_berts_shares() -> None:
    ids = torch.full((400, 102), 50)
    ids[:, 0], ids[:, -1] = 2, 3
    corrupted, labels = mask_words(ids, 100, torch.Generator().manual_seed(0))
    chosen = labels != IGNORED
    assert not chosen[:, [0, -1]].any()
    assert torch.equal(corrupted[~chosen], ids[~chosen])
    assert torch.equal(labels[chosen], ids[chosen])
    assert chosen[:, 1:-1].float().mean().item() == pytest.approx(0.15, abs=0.01)
    share = [(corrupted[chosen] == value).float().mean().item() for value in (SPECIAL.index("[MASK]"), 50)]
    assert share == pytest.approx([0.8, 0.1], abs=0.02)
    assert corrupted[chosen].min() >= SPECIAL.index("[MASK]")


def test_equal_arguments_give_equal_weights_and_no_trace(tmp_path: Path) -> None:
    texts = captions("val")[:50]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_mlm(texts, tmp_path / name, seed=seed, steps=3, batch_size=8)
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(self: BertTokenizer, folder: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(BertTokenizer, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space"):
        train_mlm(["a red dog"], tmp_path / "model", seed=0, steps=1, batch_size=2)
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        train_mlm(["a"], tmp_path, seed=0)
    with pytest.raises(UserError, match="needs captions"):
        train_mlm([], tmp_path / "model", seed=0)
