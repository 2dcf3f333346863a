"""The official layout of BLIP's captioning checkpoints (`model_base_caption_*.pth`), read into transformers' model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor
from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration

from fastmat.errors import UserError
from fastmat.models.fusion_checkpoint import count
from fastmat.models.vit import resized_positions
from fastmat.models.weights import load_state

POSITIONS = "visual_encoder.pos_embed"
PATCHES = "visual_encoder.patch_embed.proj.weight"
WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
NEEDED = (POSITIONS, PATCHES, WORDS, "visual_encoder.blocks.0.mlp.fc1.weight")
HEAD = "text_decoder.cls.predictions."
# Official names to those of transformers; the decoder's are the same.
NAMES = {
    r"visual_encoder\.cls_token": "vision_model.embeddings.class_embedding",
    r"visual_encoder\.pos_embed": "vision_model.embeddings.position_embedding",
    r"visual_encoder\.patch_embed\.proj\.": "vision_model.embeddings.patch_embedding.",
    r"visual_encoder\.norm\.": "vision_model.post_layernorm.",
    r"visual_encoder\.blocks\.(\d+)\.norm": r"vision_model.encoder.layers.\1.layer_norm",
    r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.": r"vision_model.encoder.layers.\1.self_attn.qkv.",
    r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.": r"vision_model.encoder.layers.\1.self_attn.projection.",
    r"visual_encoder\.blocks\.(\d+)\.mlp\.": r"vision_model.encoder.layers.\1.mlp.",
}


def captioner_of(
    state: Mapping[str, Tensor],
    bert: BertTokenizerFast,
    *,
    image_size: int | None,
    image_heads: int,
    text_heads: int,
    source: str,
) -> BlipForConditionalGeneration:
    """The captioner with the tensors of an official file. Sizes are read off them, heads are told; [DEC] and [ENC]
    follow the pieces of `bert`. image_size: instead of the file's own; position embeddings are interpolated.

    Raises UserError when the file is another model's, naming every key that does not match.
    """
    missing = [key for key in NEEDED if key not in state]
    if missing:
        raise UserError(f"{source} is no captioner of BLIP: '{missing[0]}' is missing")
    patch, cells = state[PATCHES].shape[-1], state[POSITIONS].shape[1] - 1
    size = math.isqrt(cells) * patch if image_size is None else image_size
    if size < patch or size % patch:
        raise UserError(f"image_size must be a multiple of the patch size {patch}, got {size}")
    vocabulary, width = state[WORDS].shape
    image_width = state[POSITIONS].shape[-1]
    for name, heads, of in (("image_heads", image_heads, image_width), ("text_heads", text_heads, width)):
        if heads < 1 or of % heads:
            raise UserError(f"{name} must divide the width {of}, got {heads}")
    vision = {
        "hidden_size": image_width,
        "intermediate_size": state["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count(state, "visual_encoder.blocks."),
        "num_attention_heads": image_heads,
        "image_size": size,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,  # the official code's; transformers' default is another
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "encoder_hidden_size": image_width,
        "intermediate_size": state["text_decoder.bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": count(state, "text_decoder.bert.encoder.layer."),
        "num_attention_heads": text_heads,
        "max_position_embeddings": state["text_decoder.bert.embeddings.position_embeddings.weight"].shape[0],
        "pad_token_id": bert.pad_token_id,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": bert.sep_token_id,
        "sep_token_id": bert.sep_token_id,
    }
    blip = BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text))
    renamed = {}
    for key, value in state.items():
        if key.endswith("embeddings.position_ids"):  # a buffer that older libraries wrote: 0, 1, 2, ...
            continue
        value = resized_positions(value, size // patch) if key == POSITIONS else value
        for official, theirs in NAMES.items():
            key = re.sub(f"^{official}", theirs, key)
        renamed[key] = value
    if f"{HEAD}bias" in renamed:  # one parameter under two names, of which older libraries wrote one
        renamed.setdefault(f"{HEAD}decoder.bias", renamed[f"{HEAD}bias"])
    load_state(blip, renamed, source=source, most=None)
    return blip
