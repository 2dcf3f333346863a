"""A random masked language model with a vocabulary of a hundred pieces, and captions in it."""

import random

import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from fastmat.text.masked import MaskedCandidates
from fastmat.text.mlm import MaskedLanguageModel

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
STOPS = ["the", "a", "in", "on", "with", "and", ".", ",", "'", "-"]
NOUNS = ["dog", "cat", "man", "woman", "boy", "girl", "ball", "park", "water", "snow", "street", "hat"]
WORDS = [*NOUNS, "red", "blue", "green", "black", "runs", "sits", "jumps", "plays"]
SUFFIXES = ["##s", "##ing", "##er", "##ball"]
LETTERS = list("bcdefghijklmnopqrstuvwxyz")
VOCABULARY = [*SPECIAL, *STOPS, *WORDS, *SUFFIXES, *LETTERS, *(f"##{letter}" for letter in "abcdefghij")]


def tiny_parts(*, seed: int = 0) -> tuple[BertForMaskedLM, BertTokenizerFast]:
    """Model and tokenizer as transformers has them. Top-10 logits lie on both sides of 1.5."""
    tokenizer = BertTokenizerFast(vocab={piece: i for i, piece in enumerate(VOCABULARY)})
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForMaskedLM(config).eval(), tokenizer


def tiny_mlm(*, seed: int = 0) -> MaskedLanguageModel:
    model, tokenizer = tiny_parts(seed=seed)
    return MaskedLanguageModel(model=model, tokenizer=tokenizer, name="tiny")


def tiny_candidates(*, top_k: int = 10, threshold: float = 0.3) -> MaskedCandidates:
    return MaskedCandidates(mlm=tiny_mlm(), top_k=top_k, threshold=threshold)


def tiny_captions(count: int, *, seed: int = 0) -> list[str]:
    """Words, stop words, words of several pieces, capitals, unknown words, literal [UNK], double blanks."""
    draw = random.Random(seed)
    odd = ["dogs", "playing", "Dogballs", "bcd", "The", "Cat", "dog's", "[UNK]", "狗", "redder", "", "q-z", "catballer"]
    return [
        " ".join(draw.choice(draw.choice([STOPS, WORDS, WORDS, odd])) for _ in range(draw.randint(1, 14)))
        for _ in range(count)
    ]
