"""BLIP for retrieval (Li et al., ICML 2022): every layer of its BERT may look at the image.

A text alone passes through the layers without their cross-attention; to be matched, it passes again, with the image and
with [ENC] in the place of [CLS].
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmat.errors import UserError
from fastmat.models.fusion_bert import EPS, INIT_STD
from fastmat.models.fusion_checkpoint import FusionCheckpoint, FusionSizes, first_fusion_layer
from fastmat.models.matcher import Matcher, fusion_of
from fastmat.models.protocol import TextState, TextTokens, Tokenizer
from fastmat.models.shifting import shifted
from fastmat.models.tokenizers import WordPieceTokenizer, read_bert_tokenizer
from fastmat.models.weights import load_state, read_state

MatchToken = Literal["enc", "cls"]
# The keys of transformers' BlipForImageTextRetrieval whose official names differ.
TRANSFORMERS_NAMES = {
    r"vision_model\.embeddings\.class_embedding": "visual_encoder.cls_token",
    r"vision_model\.embeddings\.position_embedding": "visual_encoder.pos_embed",
    r"vision_model\.embeddings\.patch_embedding\.": "visual_encoder.patch_embed.proj.",
    r"vision_model\.post_layernorm\.": "visual_encoder.norm.",
    r"vision_model\.encoder\.layers\.(\d+)\.layer_norm": r"visual_encoder.blocks.\1.norm",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.": r"visual_encoder.blocks.\1.attn.qkv.",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.": r"visual_encoder.blocks.\1.attn.proj.",
    r"vision_model\.encoder\.layers\.(\d+)\.mlp\.": r"visual_encoder.blocks.\1.mlp.",
}


class TextEmbeddings(nn.Module):
    """Ids [T, L] to [T, L, W]: words and positions, no token types."""

    def __init__(self, *, vocabulary: int, positions: int, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(positions, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.dropout = dropout
        for table in (self.word_embeddings, self.position_embeddings):
            nn.init.normal_(table.weight, std=INIT_STD)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]
        return F.dropout(self.LayerNorm(x), self.dropout, self.training)


class Blip(Matcher):
    """Implements `fastmat.models.protocol.FusionModel`, with random weights.

    match_token: what stands first when a text is matched: "enc", as in retrieval, the last id of the vocabulary; or
    "cls", the text's own first id, as in the stand-alone matching model.
    """

    ranks_with_cosine = True
    rereads_text = True

    def __init__(
        self, *, sizes: FusionSizes, tokenizer: Tokenizer, context_length: int, match_token: MatchToken = "enc"
    ) -> None:
        super().__init__(sizes=sizes, tokenizer=tokenizer, context_length=context_length)
        if match_token not in get_args(MatchToken):
            raise UserError(f"match_token must be one of {', '.join(get_args(MatchToken))}, got {match_token!r}")
        self.match_token = match_token
        self.temp_bounds = (0.001, 0.5)  # where training keeps the temperature, as published; ALBEF's is free
        embeddings = TextEmbeddings(vocabulary=sizes.vocabulary, positions=sizes.positions, width=sizes.text_width)
        self.text_tower = nn.Sequential(OrderedDict(embeddings=embeddings))
        self.fusion = fusion_of(sizes)

    @property
    def token_embedding(self) -> nn.Embedding:
        embedding: nn.Embedding = self.text_tower.embeddings.word_embeddings  # type: ignore[union-attr, assignment]
        return embedding

    def encode_tokens(self, tokens: TextTokens) -> Tensor:
        with shifted(self.token_embedding, tokens.shift):
            return self.fusion(self.text_tower(tokens.ids), tokens.mask, None)[0]

    def fusion_input(self, text: TextState) -> Tensor:
        ids = text.ids
        if self.match_token == "enc":
            ids = torch.cat((torch.full_like(ids[:, :1], self.sizes.vocabulary - 1), ids[:, 1:]), 1)
        return self.text_tower(ids)


def load_blip(
    checkpoint: Path | None = None,
    *,
    vocabulary: str = "google-bert/bert-base-uncased",
    image_size: int | None = None,
    image_heads: int = 12,
    text_heads: int = 12,
    context_length: int = 35,
    match_token: MatchToken = "enc",
) -> Blip:
    """BLIP from an official checkpoint (`model_base_retrieval_*.pth`, `model_base.pth`), from transformers' layout
    (`BlipForImageTextRetrieval.save_pretrained`), or without one.

    checkpoint: a torch or safetensors file in either layout; momentum encoders, queues and the decoder in it are left
        alone; transformers' files have no temperature, and get 0.07. None: random weights in the published sizes.
    vocabulary: BERT's `vocab.txt`, a folder with a tokenizer, or a hub id; [DEC] and [ENC] follow its pieces.
    image_size: another resolution than the checkpoint's (random weights: 384); position embeddings are interpolated.
        image_heads, text_heads: attention heads, which no weight tells. context_length: tokens per caption.
        match_token: "enc" or "cls", see `Blip`.
    Layer norms of the vision encoder add 1e-6 as in the official code; transformers' configuration often says 1e-5.
    Raises UserError when a file is missing, carries code or is another model's, naming every key that does not match.
    """
    heads = {"image_heads": image_heads, "text_heads": text_heads}
    source, parts = str(checkpoint), None
    if checkpoint is None:
        sizes = FusionSizes(image_size=image_size or 384, vocabulary=30524, text_layers=0, fusion_layers=12, **heads)
    else:
        state = official_names(read_state(checkpoint))
        first = first_fusion_layer(state)
        if first != 0:
            why = "no layer of a text encoder in it looks at an image"
            albef = f"the first {first} layers of its text encoder never look at the image, as ALBEF's"
            raise UserError(f"{source} is no BLIP checkpoint: {why if first is None else albef}")
        parts = FusionCheckpoint.of(state, first=first)
        sizes = FusionSizes.of(parts.model, image_size=image_size, **heads, source=source)
        parts = parts.at(sizes)
    bert = read_bert_tokenizer(vocabulary, size=sizes.vocabulary, added=2)
    model = Blip(
        sizes=sizes, tokenizer=WordPieceTokenizer(bert), context_length=context_length, match_token=match_token
    )
    if parts is not None:
        load_state(model, parts.model, source=source, most=None)
    return model


def official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official names of what transformers wrote, with the temperature that it leaves out; others as they are."""
    renamed = dict(state)
    if any(key.startswith("vision_model.") for key in state):
        renamed.setdefault("temp", torch.tensor(0.07))
    for theirs, official in TRANSFORMERS_NAMES.items():
        renamed = {re.sub(f"^{theirs}", official, key): value for key, value in renamed.items()}
    return renamed
