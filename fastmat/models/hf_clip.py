"""A transformers `CLIPModel`: a local folder or a hub id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL.Image import Resampling
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from fastmat.errors import UserError
from fastmat.models.causal import CausalBlock, CausalTower
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.protocol import Tokenizer, encodable
from fastmat.models.tokenizers import is_plain
from fastmat.types import ImageTransform

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class VisionTower(nn.Module):
    """tokens: the patches of the last hidden state, normalised as the class token is before its projection."""

    def __init__(self, vision_model: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.vision_model(pixel_values=images)
        vision: Any = self.vision_model
        return output.pooler_output, vision.post_layernorm(output.last_hidden_state[:, 1:])


class TextTower(nn.Module):
    """tokens: the last hidden state. Causal, so rows need not be padded to the context."""

    def __init__(self, text_model: nn.Module) -> None:
        super().__init__()
        self.text_model = text_model

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        output = self.text_model(input_ids=ids)
        return output.pooler_output, output.last_hidden_state

    @property
    def token_embedding(self) -> nn.Embedding:
        text: Any = self.text_model
        embedding: nn.Embedding = text.embeddings.token_embedding
        return embedding

    def causal(self) -> CausalTower | None:
        """The tower block by block."""
        text: Any = self.text_model
        return CausalTower(
            embed=lambda ids, positions: text.embeddings(input_ids=ids, position_ids=positions),
            blocks=[_block(layer) for layer in text.encoder.layers],
            norm=text.final_layer_norm,
        )


def _block(layer: Any) -> CausalBlock:
    attention = layer.self_attn
    return CausalBlock(
        heads=attention.num_heads,
        norm_1=layer.layer_norm1,
        project=lambda x: (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)),
        merge=attention.out_proj,
        norm_2=layer.layer_norm2,
        feed_forward=layer.mlp,
    )


class TransformersTokenizer:
    """transformers' CLIPTokenizer, one caption at a time."""

    pad_to_context = False

    def __init__(self, wrapped: CLIPTokenizer) -> None:
        self.wrapped = wrapped
        self.pad_id = 0  # any id does: the tower is causal and pools at the first end token

    def __call__(self, text: str, max_length: int) -> list[int]:
        return self.wrapped(encodable(text), truncation=True, max_length=max_length)["input_ids"]

    def word(self, word: str) -> tuple[int, ...] | None:
        return tuple(self.wrapped(word, add_special_tokens=False)["input_ids"]) if is_plain(word) else None

    def frame(self, ids: Sequence[int], max_length: int) -> list[int]:
        return [self.wrapped.bos_token_id, *ids[: max_length - 2], self.wrapped.eos_token_id]


def load_hf_clip(path: str) -> DualEncoder:
    """A CLIPModel with its tokenizer and image processor.

    path: a folder written by `save_pretrained`, or a hub id.
    Raises UserError when files are missing, carry code, or keys do not match.
    """
    try:
        clip, info = CLIPModel.from_pretrained(path, output_loading_info=True, use_safetensors=None)
        tokenizer = CLIPTokenizer.from_pretrained(path)
        processor = CLIPImageProcessor.from_pretrained(path)
    except Exception as error:  # transformers, safetensors and pickle each raise their own
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"no CLIP model could be loaded from {path!r} ({line}); give a folder or a hub id") from error
    for tower in ("text", "vision"):
        if f"{tower}_projection.weight" in info["missing_keys"]:
            raise UserError(f"{path!r} is no whole CLIPModel: it has no {tower} tower; give a model with both towers")
    bad = {what: sorted(info[what]) for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[what]}
    if bad:
        told = {what: keys[:5] for what, keys in bad.items()}
        raise UserError(f"weights of {path!r} do not fit CLIPModel: {told}; give a folder or a hub id of a CLIPModel")
    size = processor.size.get("shortest_edge") or processor.size["height"]
    return take_apart(
        clip.float(),
        TransformersTokenizer(tokenizer),
        ImageTransform(
            size=size,
            mode="crop" if processor.do_center_crop else "squash",
            interpolation="bilinear" if processor.resample == Resampling.BILINEAR else "bicubic",
        ),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
    )


def take_apart(
    clip: CLIPModel,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    *,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> DualEncoder:
    """The pieces of a CLIPModel as a DualEncoder; `clip` is used up."""
    return DualEncoder(
        image_tower=VisionTower(clip.vision_model),
        image_projection=clip.visual_projection,
        text_tower=TextTower(clip.text_model),
        text_projection=clip.text_projection,
        log_logit_scale=clip.logit_scale,
        tokenizer=tokenizer,
        context_length=clip.config.text_config.max_position_embeddings,
        image_transform=transform,
        mean=mean,
        std=std,
    )
