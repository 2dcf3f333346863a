"""The published text attack, recorded: tokenisation, candidates, importance and every adversarial text."""

from functools import cache
from itertools import product

import pytest
import torch
from golden import golden
from golden_models import BertTextEncoder, golden_bert, golden_clip, golden_mlm

from fastmat.attacks.word_substitution import WordSubstitution
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.text import candidates
from fastmat.text.masked import MaskedCandidates
from fastmat.text.words import STOP_WORDS, split

ROW_OFFSET = {"official": 0, "fixed": 1}
BERT = ["{}.bert.L30.{}.{}.n{}".format(*p) for p in product(("nosep", "sep"), ("sga", "kl.cls"), ROW_OFFSET, (1, 2))]
CLIP = ["{}.clip.L77.{}.{}.n{}".format(*p) for p in product(("nosep", "sep"), ("sga", "kl"), ROW_OFFSET, (1, 2))]
OTHERS = [
    "nosep.bert.L30.kl.official.n1",
    "nosep.bert.L30.kl.fixed.n1",
    "nosep.bert.L12.sga.official.n1",
    "nosep.bert.L12.sga.fixed.n2",
    "nosep.bert.L12.kl.cls.official.n2",
    "nosep.clip.L30.sga.official.n1",
]
EDGE = ["nosep.bert.L30.{}.{}.n1".format(*p) for p in product(("sga", "kl.cls"), ROW_OFFSET)]
EDGE += ["nosep.clip.L77.{}.{}.n1".format(*p) for p in product(("sga", "kl"), ROW_OFFSET)]
RUNS = [("bert_attack", name) for name in BERT + CLIP + OTHERS] + [("bert_attack_edge", name) for name in EDGE]


@cache
def victim(encoder: str, append_sep: bool) -> VisionLanguageModel | BertTextEncoder:
    return golden_clip() if encoder == "clip" else golden_bert(append_sep=append_sep)


@pytest.mark.parametrize(("recording", "name"), RUNS)
def test_texts_and_importance(recording: str, name: str) -> None:
    recorded, tensors = golden(recording)
    run = recorded["runs"][name]
    clip, sga = run["encoder"] == "clip", run["method"] == "sga"
    quirks = Quirks.official(round_trip=clip, text_max_length=run["max_length"]).but(
        append_sep=run["tokenizer"] == "sep", candidate_row_offset=ROW_OFFSET[run["index"]]
    )
    model = victim(run["encoder"], quirks.append_sep)
    representation = "features" if sga else "embeds" if clip else "cls" if run["cls"] else "tokens"
    search = WordSubstitution(
        candidates=MaskedCandidates(mlm=golden_mlm()),
        max_words=run["num_perturbation"],
        choice="cosine" if sga else "kl",
        importance=representation,
        compare=representation,
        quirks=quirks,
    )
    plan = search.plan(model, recorded["texts"])
    texts = search.search(model, plan, tensors[f"guide_image_feat.{run['encoder']}"] if sga else None)
    assert list(texts) == run["adversarial"]
    if recording == "bert_attack":
        expected = tensors[f"importance.{name}"]
        measured = [(t, i, value) for t, of in enumerate(plan.importance) for i, value in of.items()]
        assert len(measured) > 90
        for t, i, value in measured:
            assert value == pytest.approx(expected[t, i].item(), abs=1e-6, rel=1e-4)


@pytest.mark.parametrize("recording", ["bert_attack", "bert_attack_edge"])
def test_no_recorded_run_is_left_out(recording: str) -> None:
    recorded, _ = golden(recording)
    assert set(recorded["runs"]) == {name for of, name in RUNS if of == recording}


@pytest.mark.parametrize("length", [12, 30, 77])
@pytest.mark.parametrize("tokenizer", ["nosep", "sep"])
def test_pieces(tokenizer: str, length: int) -> None:
    recorded, tensors = golden("bert_attack")
    mlm = golden_mlm()
    ids = torch.zeros_like(tensors[f"tokens.{tokenizer}.L{length}.input_ids"])
    for row, text in zip(ids, recorded["texts"], strict=True):
        sequence = mlm.sequence(mlm.pieces(text), append_sep=tokenizer == "sep", max_length=length)
        row[: len(sequence)] = torch.tensor(sequence)
    assert torch.equal(ids, tensors[f"tokens.{tokenizer}.L{length}.input_ids"])


@pytest.mark.parametrize("tokenizer", ["nosep", "sep"])
def test_round_trip_and_byte_pairs(tokenizer: str) -> None:
    recorded, tensors = golden("bert_attack")

    def round_trip(texts: list[str]) -> list[str]:
        return [golden_mlm().round_trip(text, append_sep=tokenizer == "sep", max_length=77) for text in texts]

    texts = round_trip(recorded["texts"])
    assert texts == recorded[f"clip_roundtrip_text.{tokenizer}"]
    assert torch.equal(golden_clip().tokenize(texts, pad=True).ids, tensors[f"clip_bpe_ids.{tokenizer}"].long())
    unknown = round_trip(recorded["clip_unk_examples"])
    assert unknown == recorded["clip_unk_roundtrip"]
    assert torch.equal(golden_clip().tokenize(unknown, pad=True).ids, tensors["clip_unk_bpe_ids"].long())


@pytest.mark.parametrize("tokenizer", ["nosep", "sep"])
@pytest.mark.parametrize("length", [12, 30, 77])
@pytest.mark.parametrize("index", ROW_OFFSET)
def test_candidates_before_filters(tokenizer: str, length: int, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, _ = golden("bert_attack")
    if (tokenizer, length) == ("sep", 12):
        assert f"sep.L12.{index}" not in recorded["candidates"]
        return
    monkeypatch.setattr(candidates, "allowed", lambda word, candidate, quirks: True)
    captions = [split(text, golden_mlm()) for text in recorded["texts"]]
    readable = [[i for i, (a, b) in enumerate(c.spans) if a < b and a <= length - 2] for c in captions]
    found = candidates.find_candidates(
        golden_mlm(),
        captions,
        readable,
        top_k=10,
        threshold=0.3,
        quirks=Quirks.official().but(append_sep=tokenizer == "sep", candidate_row_offset=ROW_OFFSET[index]),
        max_length=length,
    )
    expected = recorded["candidates"][f"{tokenizer}.L{length}.{index}"]
    for of, words, indices in zip(found, expected, readable, strict=True):
        assert {i: list(proposed) for i, proposed in of.items()} == {i: words[i] for i in indices if words[i]}


def test_stop_words() -> None:
    recorded, _ = golden("bert_attack")
    assert sorted(recorded["stop_words"]) == sorted(STOP_WORDS)
    assert len(STOP_WORDS) == 292
