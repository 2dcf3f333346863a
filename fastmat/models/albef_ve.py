"""ALBEF and TCL as they are fine-tuned for visual entailment: in place of the heads for contrast and matching, one of
three classes on the first fused token (`models/model_ve.py` of the official code)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmat.errors import UserError
from fastmat.models.albef import Albef
from fastmat.models.fusion_bert import linear
from fastmat.models.fusion_checkpoint import FusionCheckpoint, FusionSizes, first_fusion_layer
from fastmat.models.protocol import Tokenizer
from fastmat.models.tokenizers import WordPieceTokenizer, read_bert_tokenizer
from fastmat.models.weights import load_state, read_state

CLASSES = 3
HEAD = "cls_head."  # official; "cls_head_m." is its momentum copy


class NoMatching(nn.Module):
    """Where the matching head was: no answer, [P, D] to [P, 2]."""

    def forward(self, fused: Tensor) -> Tensor:
        return fused.new_full((len(fused), 2), float("nan"))


def albef_ve(*, sizes: FusionSizes, tokenizer: Tokenizer, context_length: int) -> Albef:
    """A `fastmat.models.protocol.EntailmentModel` with random weights.

    Image and text share no space: their embeds and features are their class tokens as they are, which only attacks
    within one modality or on the fusion may look at; itm_logits are NaN; the temperature says nothing.
    """
    model = Albef(sizes=sizes, tokenizer=tokenizer, context_length=context_length)
    model.image_projection = nn.Identity()
    model.text_projection = nn.Identity()
    model.itm_head = NoMatching()  # type: ignore[assignment]
    width = sizes.text_width
    layers = [("0", linear(width, width)), ("1", nn.ReLU()), ("2", linear(width, CLASSES))]
    model.entailment_head = nn.Sequential(OrderedDict(layers))
    return model


def load_albef_ve(
    checkpoint: Path | None = None,
    *,
    vocabulary: str = "google-bert/bert-base-uncased",
    image_size: int | None = None,
    image_heads: int = 12,
    text_heads: int = 12,
    context_length: int = 64,
    append_sep: bool = False,
) -> Albef:
    """ALBEF or TCL for entailment, from what the official `VE.py` saves, or without a checkpoint.

    checkpoint: a torch or safetensors file with `visual_encoder.*`, `text_encoder.*` and `cls_head.*`; momentum copies
        are left alone. None: random weights in the published sizes.
    image_size: another resolution than the checkpoint's (random weights: 384). image_heads, text_heads: which no weight
        tells. context_length: tokens per sentence; published: as many as its 30 words have. vocabulary, append_sep: as
        of the model albef.
    Raises UserError when a file is missing, carries code or is another model's, naming every key that does not match.
    """
    heads = {"image_heads": image_heads, "text_heads": text_heads}
    source, model_state = str(checkpoint), None
    if checkpoint is None:
        sizes = FusionSizes(image_size=image_size or 384, **heads)
    else:
        parts = entailment_parts(read_state(checkpoint), source=source)
        # The one size that only the head for contrast would tell, and nothing here has.
        told = {**parts.model, "image_projection.weight": torch.empty(1, 0)}
        sizes = FusionSizes.of(told, image_size=image_size, **heads, source=source)
        model_state = parts.at(sizes).model
    bert = read_bert_tokenizer(vocabulary, size=sizes.vocabulary)
    tokenizer = WordPieceTokenizer(bert, append_sep=append_sep)
    model = albef_ve(sizes=sizes, tokenizer=tokenizer, context_length=context_length)
    if model_state is not None:
        load_state(model, {**model_state, "temp": model.temp.detach()}, source=source, most=None)
    return model


def entailment_parts(state: Mapping[str, Tensor], *, source: str) -> FusionCheckpoint:
    """A file's tensors by what they are for, the head under its name here. Raises UserError without such a head."""
    if not any(key.startswith(HEAD) for key in state):
        raise UserError(
            f"{source} is no checkpoint for visual entailment: it has no '{HEAD}*'; a model for retrieval is loaded as "
            "albef"
        )
    first = first_fusion_layer(state)
    if not first:
        raise UserError(f"{source} is no ALBEF checkpoint: no upper layers of a text encoder look at an image")
    renamed = {
        key.replace(HEAD, "entailment_head.", 1) if key.startswith(HEAD) else key: value
        for key, value in state.items()
        if not key.startswith("cls_head_m.")
    }
    return FusionCheckpoint.of(renamed, first=first)
