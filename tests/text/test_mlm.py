import json
import pickle
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_mlm import tiny_captions, tiny_mlm, tiny_parts
from transformers import BertTokenizerFast

from fastmat.errors import UserError
from fastmat.text import mlm as module
from fastmat.text.mlm import MaskedLanguageModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, tokenizer = tiny_parts()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@cache
def made() -> tuple[MaskedLanguageModel, BertTokenizerFast]:
    return tiny_mlm(), tiny_parts()[1]


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_load_gives_the_saved_model(folder: Path) -> None:
    loaded, made = MaskedLanguageModel.load(folder), tiny_mlm()
    assert loaded.name == str(folder)
    assert loaded.tokens == made.tokens
    assert loaded.fingerprint == made.fingerprint != tiny_mlm(seed=1).fingerprint
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    sequences = [loaded.sequence(loaded.pieces(t), append_sep=True, max_length=64) for t in tiny_captions(3)]
    rows = [list(range(len(s))) for s in sequences]
    assert loaded.top_k(sequences, rows, k=5) == made.top_k(sequences, rows, k=5)


def test_half_precision_weights_run_in_fp32(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({k: v.half() for k, v in weights.items()}))
    assert MaskedLanguageModel.load(folder).model.dtype == torch.float32


def test_heads_of_pre_training_are_let_be(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({"cls.seq_relationship.weight": torch.zeros(2, 16)}))
    assert MaskedLanguageModel.load(folder).fingerprint == tiny_mlm().fingerprint


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda w: w.pop("bert.embeddings.position_embeddings.weight"), "position_embeddings"),
        (lambda w: w.update({"stray.weight": torch.zeros(1)}), "stray.weight"),
        (lambda w: w.update({"bert.embeddings.LayerNorm.weight": torch.ones(3)}), "LayerNorm.weight"),
    ],
)
def test_weights_that_do_not_fit(folder: Path, change, key: str) -> None:
    rewrite(folder, change)
    with pytest.raises(UserError, match=key):
        MaskedLanguageModel.load(folder)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        MaskedLanguageModel.load(tmp_path / "nowhere")


def test_folder_without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        MaskedLanguageModel.load(folder)


def test_tokenizer_of_another_model(folder: Path) -> None:
    config = json.loads((folder / "tokenizer.json").read_text())
    config["model"]["vocab"]["extra"] = len(config["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="pieces"):
        MaskedLanguageModel.load(folder)


def test_code_in_a_pickle_is_not_run(folder: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (folder / "model.safetensors").unlink()
    torch.save({"bert.embeddings.LayerNorm.weight": Payload()}, folder / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(UserError, match="no masked language model"):
        MaskedLanguageModel.load(folder)
    assert not (tmp_path / "ran").exists()


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
def test_words_apart_give_the_pieces_of_the_whole(text: str) -> None:
    mlm, tokenizer = made()
    assert list(mlm.pieces(text)) == tokenizer(text, add_special_tokens=False).input_ids


def test_sequence() -> None:
    mlm = tiny_mlm()
    assert mlm.sequence((7, 8, 9), append_sep=True, max_length=8) == [mlm.cls_id, 7, 8, 9, mlm.sep_id]
    assert mlm.sequence((7, 8, 9), append_sep=True, max_length=4) == [mlm.cls_id, 7, 8, mlm.sep_id]
    assert mlm.sequence((7, 8, 9), append_sep=False, max_length=4) == [mlm.cls_id, 7, 8, 9]
    assert mlm.sequence((7, 8, 9), append_sep=False, max_length=3) == [mlm.cls_id, 7, 8]


@pytest.mark.parametrize(
    ("text", "max_length", "expected"),
    [
        ("The DOG runs .", 20, "the dog runs."),
        ("dogs , the hat", 20, "dogs, the hat"),
        ("dog ' s hat", 20, "dog's hat"),
        ("dog ' s hat", 3, "dog '"),  # cut: nothing follows the apostrophe
        ("dog '", 20, "dog'"),  # padded: clean-up meets the apostrophe between two tokens, as published
        ("' dog", 20, "'dog"),
        ("a [UNK] dog", 20, "a [UNK] dog"),
        ("a [SEP] dog", 20, "a  dog"),
        ("", 20, ""),
    ],
)
def test_round_trip(text: str, max_length: int, expected: str) -> None:
    assert tiny_mlm().round_trip(text, append_sep=False, max_length=max_length) == expected


def test_top_k_equals_one_sequence_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POSITIONS_PER_CHUNK", 40)
    mlm = tiny_mlm()
    sequences = [mlm.sequence(mlm.pieces(t), append_sep=True, max_length=64) for t in tiny_captions(12)]
    rows = [[i for i in range(len(s)) if i % 3 == n % 3] for n, s in enumerate(sequences)]
    rows[4] = []
    for sequence, chosen, (ids, logits) in zip(sequences, rows, mlm.top_k(sequences, rows, k=7), strict=True):
        expected = mlm.model(torch.tensor([sequence])).logits[0, chosen].topk(7)
        assert ids == expected.indices.tolist()
        if chosen:
            torch.testing.assert_close(torch.tensor(logits), expected.values, atol=1e-5, rtol=1e-5)


def test_top_k_of_more_than_the_vocabulary() -> None:
    mlm = tiny_mlm()
    ((ids, _),) = mlm.top_k([[2, 7, 3]], [[1]], k=10_000)
    assert sorted(ids[0]) == list(range(len(mlm.tokens)))


def test_log_perplexity_is_the_mean_surprise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POSITIONS_PER_CHUNK", 6)
    mlm = tiny_mlm()
    sequences = [[7, 8], [9, 10, 11], [12, 13], [14], [15, 16], [17, 18, 19]]
    for sequence, value in zip(sequences, mlm.log_perplexity(sequences), strict=True):
        logits = mlm.model(torch.tensor([sequence])).logits[0]
        assert value == pytest.approx(F.cross_entropy(logits, torch.tensor(sequence)).item(), abs=1e-5)
    assert mlm.log_perplexity([]) == []
