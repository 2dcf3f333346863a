"""A BERT masked language model with its WordPiece tokenizer: pieces, top-k pieces per position, pseudo-perplexity.

Frozen, fp32, in eval mode. Everything is batched over captions; padding changes no result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertForMaskedLM, BertTokenizerFast

from fastmat.errors import UserError
from fastmat.models.protocol import encodable

# Heads that BERT's own pre-training checkpoints carry beside the masked language model.
OTHER_HEADS = ("bert.pooler.", "cls.seq_relationship.")
# The decoder's logits are [positions, vocabulary] fp32: 512 positions of BERT's vocabulary are 62 MB.
POSITIONS_PER_CHUNK = 512
# What decoding does to blanks before punctuation and contractions, in this order.
CLEAN_UP = (
    *((f" {mark}", mark) for mark in (".", "?", "!", ",")),
    (" ' ", "'"),
    *((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")),
)

DROPPED = ("[PAD]", "[CLS]", "[SEP]")  # what decoding leaves out


class MaskedLanguageModel:
    """tokens: the vocabulary, id to piece. max_length: positions the model has. name: where it came from."""

    def __init__(self, *, model: BertForMaskedLM, tokenizer: BertTokenizerFast, name: str) -> None:
        if len(tokenizer) != model.config.vocab_size:
            raise UserError(
                f"{name}: the tokenizer has {len(tokenizer)} pieces, the model {model.config.vocab_size}; "
                "the folder needs the tokenizer.json or vocab.txt the model was trained with"
            )
        self.model = model.float().eval().requires_grad_(False)
        self.name = name
        self.tokens: tuple[str, ...] = tuple(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        self.max_length: int = model.config.max_position_embeddings
        self.cls_id: int = tokenizer.cls_token_id
        self.sep_id: int = tokenizer.sep_token_id
        self.pad_id: int = tokenizer.pad_token_id
        backend = tokenizer.backend_tokenizer
        self._word_pieces = lru_cache(maxsize=1 << 16)(
            lambda word: tuple(backend.encode(encodable(word), add_special_tokens=False).ids)
        )

    @classmethod
    def load(cls, folder: str | Path) -> MaskedLanguageModel:
        """A folder in the transformers layout, or a hub id.

        Raises UserError when files are missing, carry code, or do not fit together.
        """
        name = str(folder)
        if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
            raise UserError(f"{name} has neither tokenizer.json nor vocab.txt; save the model's tokenizer there")
        try:
            model, info = BertForMaskedLM.from_pretrained(
                name, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32
            )  # mismatches are named below
            tokenizer = BertTokenizerFast.from_pretrained(name)
        except Exception as error:  # transformers, safetensors and pickle each raise their own
            line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(
                f"no masked language model could be loaded from {name!r} ({line}); "
                "give a folder with config.json, model.safetensors and tokenizer.json, or a hub id"
            ) from error
        unexpected = [key for key in info["unexpected_keys"] if not key.startswith(OTHER_HEADS)]
        bad = {"missing": info["missing_keys"], "unexpected": unexpected, "mismatched": info["mismatched_keys"]}
        bad = {what: sorted(map(str, keys))[:5] for what, keys in bad.items() if keys}
        if bad:
            raise UserError(f"weights of {name!r} do not fit BertForMaskedLM: {bad}; give a BERT masked language model")
        return cls(model=model, tokenizer=tokenizer, name=name)

    def to(self, device: torch.device | str) -> MaskedLanguageModel:
        """Moves the model in place; returns itself."""
        self.model.to(device)
        return self

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of vocabulary and weights."""
        digest = hashlib.sha256("\n".join(self.tokens).encode())
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def pieces(self, text: str) -> tuple[int, ...]:
        """Piece ids of a text without special tokens. WordPiece never joins across a blank, so words are cached."""
        return tuple(piece for word in text.split(" ") for piece in self._word_pieces(word))

    def sequence(self, pieces: Sequence[int], *, append_sep: bool, max_length: int) -> list[int]:
        """`[CLS] pieces [SEP]`, or without [SEP], at most `max_length` ids."""
        if append_sep:
            return [self.cls_id, *pieces[: max_length - 2], self.sep_id]
        return [self.cls_id, *pieces[: max_length - 1]]

    def join(self, ids: Sequence[int]) -> str:
        """Pieces to words: blanks between them, none before a continuation."""
        return " ".join(self.tokens[i] for i in ids).replace(" ##", "")

    def round_trip(self, text: str, *, append_sep: bool, max_length: int) -> str:
        """What is left of a text after encoding and decoding, as SGA and Co-Attack hand it to CLIP's tokenizer.

        Lower-cased, without accents, truncated, blanks before punctuation removed.
        """
        ids = self.sequence(self.pieces(text), append_sep=append_sep, max_length=max_length)
        padding = [self.pad_id] * (len(ids) < max_length)  # clean-up looks at the neighbour; one stands for all
        decoded = self.cleaned_up(self.join([*ids, *padding]))
        for special in DROPPED:
            decoded = decoded.replace(special, "")
        return decoded.strip()

    def cleaned_up(self, decoded: str) -> str:
        """What decoding does to blanks before punctuation and contractions."""
        for found, replacement in CLEAN_UP:
            decoded = decoded.replace(found, replacement)
        return decoded

    @torch.no_grad()
    def top_k(
        self, sequences: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], *, k: int
    ) -> list[tuple[list[list[int]], list[list[float]]]]:
        """The k likeliest pieces at chosen positions of unmasked sequences, best first.

        sequences: N lists of ids; rows: the positions of each to read. Returns N pairs (ids [R, k], logits [R, k]).
        """
        found: list[tuple[list[list[int]], list[list[float]]]] = [([], []) for _ in sequences]
        wanted = [i for i, chosen in enumerate(rows) if chosen]
        for chunk in _chunks(wanted, [len(sequence) for sequence in sequences]):
            hidden = self._hidden([sequences[i] for i in chunk])
            at = [(n, row) for n, i in enumerate(chunk) for row in rows[i]]
            picked = hidden[[n for n, _ in at], [row for _, row in at]]
            values, ids = self.model.cls(picked).topk(min(k, len(self.tokens)))
            lists = zip(at, ids.tolist(), values.tolist(), strict=True)
            for (n, _), row_ids, row_values in lists:
                found[chunk[n]][0].append(row_ids)
                found[chunk[n]][1].append(row_values)
        return found

    @torch.no_grad()
    def log_perplexity(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Mean negative log-likelihood of each unmasked sequence under itself, without special tokens."""
        result = [0.0] * len(sequences)
        for length in sorted({len(sequence) for sequence in sequences}):
            same = [i for i, sequence in enumerate(sequences) if len(sequence) == length]
            for chunk in _chunks(same, [len(sequence) for sequence in sequences]):
                hidden = self._hidden([sequences[i] for i in chunk])
                target = torch.tensor([sequences[i] for i in chunk], device=hidden.device)
                loss = F.cross_entropy(self.model.cls(hidden).flatten(0, 1), target.flatten(), reduction="none")
                for i, value in zip(chunk, loss.view(len(chunk), length).mean(1).tolist(), strict=True):
                    result[i] = value
        return result

    def _hidden(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """[N, L, D] last hidden states, padded to the longest."""
        longest = max(map(len, sequences))
        ids = torch.tensor([[*s, *[self.pad_id] * (longest - len(s))] for s in sequences])
        mask = torch.arange(longest) < torch.tensor([[len(s)] for s in sequences])
        device = self.model.device
        return self.model.bert(input_ids=ids.to(device), attention_mask=mask.long().to(device)).last_hidden_state


def _chunks(items: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Items by increasing length, cut so that a chunk holds at most POSITIONS_PER_CHUNK padded positions."""
    chunk: list[int] = []
    for i in sorted(items, key=lengths.__getitem__):
        if chunk and (len(chunk) + 1) * lengths[i] > POSITIONS_PER_CHUNK:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk
