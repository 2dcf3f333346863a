"""A small masked language model of a set's own captions, so that the text attack on the built-in set is the real one.

BERT's recipe (Devlin et al., 2019): 15 % of the words are chosen; of these 80 % become [MASK], 10 % a random word, and
10 % stay. The attack reads the model on unmasked captions, which the last two kinds prepare it for. The vocabulary is
the captions' own words, one piece each.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from fastmat.errors import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_LENGTH = 128
IGNORED = -100


def train_mlm(captions: Sequence[str], folder: Path, *, seed: int, steps: int = 600, batch_size: int = 64) -> None:
    """Train on `captions` and write `folder` (transformers layout, safetensors): BertForMaskedLM and BertTokenizer.

    About 8 seconds on one core for the built-in set. Equal arguments give equal weights. The folder appears at once,
    complete; the global random stream is left as it was.

    Raises UserError when `folder` exists or there are no captions.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; name another folder for the masked language model, or remove it")
    if not captions:
        raise UserError("a masked language model needs captions to learn from, got none")
    tokenizer = word_tokenizer(captions)
    encoded = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _fit(encoded["input_ids"], len(tokenizer), seed=seed, steps=steps, batch_size=batch_size)
    _write(folder, model, tokenizer)


def word_tokenizer(captions: Sequence[str]) -> BertTokenizer:
    """BERT's own splitting and lower-casing, with a vocabulary of the special tokens and every word of `captions`."""
    splitter = BertTokenizer(do_lower_case=True).backend_tokenizer
    words = {
        word
        for caption in captions
        for word, _ in splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(caption))
    }
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *sorted(words)))}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=MAX_LENGTH)


def mask_words(ids: Tensor, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Corrupted ids [B, L], and the original ids where a word was chosen, IGNORED elsewhere."""
    chosen = (torch.rand(ids.shape, generator=generator) < 0.15) & (ids >= len(SPECIAL))
    kind = torch.rand(ids.shape, generator=generator)
    noise = torch.randint(len(SPECIAL), vocabulary, ids.shape, generator=generator)
    corrupted = ids.masked_fill(chosen & (kind < 0.8), SPECIAL.index("[MASK]"))
    corrupted = torch.where(chosen & (kind >= 0.9), noise, corrupted)
    return corrupted, ids.masked_fill(~chosen, IGNORED)


def _fit(ids: Tensor, vocabulary: int, *, seed: int, steps: int, batch_size: int) -> BertForMaskedLM:
    """`ids` [N, L], padded with 0. AdamW, one-cycle learning rate."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,  # a few hundred steps do not overfit
        attention_probs_dropout_prob=0.0,
        pad_token_id=SPECIAL.index("[PAD]"),
    )
    model = BertForMaskedLM(config).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=max(2, steps), pct_start=0.1)
    for _ in range(steps):
        rows = ids[torch.randint(len(ids), (batch_size,), generator=generator)]
        corrupted, labels = mask_words(rows, vocabulary, generator)
        loss = model(input_ids=corrupted, attention_mask=(rows != SPECIAL.index("[PAD]")).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _write(folder: Path, model: BertForMaskedLM, tokenizer: BertTokenizer) -> None:
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
