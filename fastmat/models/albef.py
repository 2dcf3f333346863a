"""ALBEF (Li et al., NeurIPS 2021) and TCL (Yang et al., CVPR 2022), which is ALBEF with other weights.

A vision transformer, the lower half of a BERT on the text alone, the upper half on the text that looks at the image;
contrastive heads on the first tokens of both towers, a matching head on the first fused token.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from transformers import BertConfig, BertModel

from fastmat.errors import UserError
from fastmat.models.fusion_checkpoint import FusionCheckpoint, FusionSizes, first_fusion_layer
from fastmat.models.matcher import Matcher, fusion_of
from fastmat.models.protocol import TextState, TextTokens, Tokenizer
from fastmat.models.shifting import shifted
from fastmat.models.tokenizers import WordPieceTokenizer, read_bert_tokenizer
from fastmat.models.weights import load_state, read_state


class Albef(Matcher):
    """Implements `fastmat.models.protocol.FusionModel`, with random weights."""

    ranks_with_cosine = False
    rereads_text = False

    def __init__(self, *, sizes: FusionSizes, tokenizer: Tokenizer, context_length: int) -> None:
        super().__init__(sizes=sizes, tokenizer=tokenizer, context_length=context_length)
        self.text_tower = BertModel(
            BertConfig(
                vocab_size=sizes.vocabulary,
                max_position_embeddings=sizes.positions,
                hidden_size=sizes.text_width,
                num_hidden_layers=sizes.text_layers,
                num_attention_heads=sizes.text_heads,
                intermediate_size=sizes.text_hidden,
            ),
            add_pooling_layer=False,
        )
        self.fusion = fusion_of(sizes)

    @property
    def token_embedding(self) -> nn.Embedding:
        embedding: nn.Embedding = self.text_tower.embeddings.word_embeddings
        return embedding

    def encode_tokens(self, tokens: TextTokens) -> Tensor:
        with shifted(self.token_embedding, tokens.shift):
            hidden: Tensor = self.text_tower(input_ids=tokens.ids, attention_mask=tokens.mask.long()).last_hidden_state
        return hidden

    def fusion_input(self, text: TextState) -> Tensor:
        assert text.tokens is not None
        return text.tokens


def load_albef(
    checkpoint: Path | None = None,
    *,
    vocabulary: str = "google-bert/bert-base-uncased",
    image_size: int | None = None,
    image_heads: int = 12,
    text_heads: int = 12,
    context_length: int = 30,
    append_sep: bool = False,
) -> Albef:
    """ALBEF or TCL from an official checkpoint (`ALBEF.pth`, `flickr30k.pth`, `mscoco.pth`, TCL's), or without one.

    checkpoint: a torch or safetensors file in the official layout; momentum encoders, queues and the head of the masked
        language model in it are left alone. None: random weights in the published sizes.
    vocabulary: BERT's `vocab.txt`, a folder with a tokenizer, or a hub id. image_size: another resolution than the
        checkpoint's (random weights: 384); position embeddings are interpolated. image_heads, text_heads: attention
        heads, which no weight tells. context_length: tokens per caption. append_sep: whether [SEP] ends a caption; in
        the official code it does not.
    Raises UserError when a file is missing, carries code or is another model's, naming every key that does not match.
    """
    heads = {"image_heads": image_heads, "text_heads": text_heads}
    source, parts = str(checkpoint), None
    if checkpoint is None:
        sizes = FusionSizes(image_size=image_size or 384, **heads)
    else:
        state = read_state(checkpoint)
        first = first_fusion_layer(state)
        if not first:
            why = "no layer of a text encoder in it looks at an image"
            blip = "its text encoder looks at the image from its first layer on, as BLIP's"
            raise UserError(f"{source} is no ALBEF checkpoint: {why if first is None else blip}")
        parts = FusionCheckpoint.of(state, first=first)
        sizes = FusionSizes.of(parts.model, image_size=image_size, **heads, source=source)
        parts = parts.at(sizes)
    bert = read_bert_tokenizer(vocabulary, size=sizes.vocabulary)
    tokenizer = WordPieceTokenizer(bert, append_sep=append_sep)
    model = Albef(sizes=sizes, tokenizer=tokenizer, context_length=context_length)
    if parts is not None:
        load_state(model, parts.model, source=source, most=None)
    return model
