"""The official layout of ALBEF, TCL and BLIP checkpoints: whose keys are whose, and the sizes that the weights tell.

ALBEF's pre-training files carry the head of the masked language model, and `bert.` in the text encoder's keys; BLIP's
carry a decoder. All may carry momentum copies of the encoders (`visual_encoder_m`, ...) and queues of features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fastmat.errors import UserError
from fastmat.models.fusion_bert import layer_key
from fastmat.models.vit import resized_positions

# Top-level names, official to ours. The upper layers of the text encoder are the fusion encoder.
NAMES = {
    "visual_encoder": "image_tower",
    "vision_proj": "image_projection",
    "text_encoder": "text_tower",
    "text_proj": "text_projection",
}
QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue")
POSITIONS = "image_tower.pos_embed"
PATCHES = "image_tower.patch_embed.proj.weight"
LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class FusionCheckpoint:
    """A file's tensors by what they are for.

    model: encoders and heads, named as in `Albef` and `Blip`; a key that is nobody's keeps its name. momentum: copies
    of encoders and projections, named alike. queues; pretraining (a language model's head, a decoder): as in the file.
    """

    model: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor]
    queues: Mapping[str, Tensor]
    pretraining: Mapping[str, Tensor]

    @classmethod
    def of(cls, state: Mapping[str, Tensor], *, first: int) -> FusionCheckpoint:
        """first: the text encoder's first layer that looks at the image, of `first_fusion_layer`."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "momentum": {}, "queues": {}, "pretraining": {}}
        for key, value in state.items():
            top, _, rest = key.partition(".")
            encoder = top.removesuffix("_m")
            rest = rest.removeprefix("bert.") if encoder == "text_encoder" else rest
            if key in QUEUES:
                parts["queues"][key] = value
            elif top == "text_decoder" or (encoder == "text_encoder" and rest.startswith("cls.")):
                parts["pretraining"][key] = value
            elif encoder not in NAMES:
                parts["model"][key] = value
            elif rest != "embeddings.position_ids":  # a buffer that older libraries wrote: 0, 1, 2, ...
                parts["momentum" if top.endswith("_m") else "model"][named(encoder, rest, first)] = value
        return cls(**parts)

    def at(self, sizes: FusionSizes) -> FusionCheckpoint:
        """The same with the position embeddings of every image encoder interpolated to the grid of `sizes`."""
        grid = sizes.image_size // sizes.patch
        model, momentum = (
            {key: resized_positions(value, grid) if key == POSITIONS else value for key, value in part.items()}
            for part in (self.model, self.momentum)
        )
        return replace(self, model=model, momentum=momentum)


def named(encoder: str, rest: str, first: int) -> str:
    """Our name of an encoder's key.

    >>> named("text_encoder", "encoder.layer.7.output.dense.bias", 6)
    'fusion.layers.1.feed_forward.merge.bias'
    """
    layer = LAYER.fullmatch(rest) if encoder == "text_encoder" else None
    if layer is not None and int(layer[1]) >= first:
        return f"fusion.layers.{int(layer[1]) - first}.{layer_key(layer[2])}"
    return f"{NAMES[encoder]}.{rest}"


def first_fusion_layer(state: Mapping[str, Tensor]) -> int | None:
    """The text encoder's first layer with cross-attention, counted from 0; None where no layer has it."""
    layers = (LAYER.search(key) for key in state if key.startswith("text_encoder."))
    return min((int(of[1]) for of in layers if of is not None and of[2].startswith("crossattention.")), default=None)


@dataclass(frozen=True, kw_only=True)
class FusionSizes:
    """Of every part; ALBEF's. image_hidden, text_hidden: inside the feed-forward layers. vocabulary, positions: ids and
    tokens that the text encoder knows. text_layers, fusion_layers: that never look at the image, and that may."""

    image_size: int = 384
    patch: int = 16
    image_width: int = 768
    image_layers: int = 12
    image_heads: int = 12
    image_hidden: int = 3072
    vocabulary: int = 30522
    positions: int = 512
    text_width: int = 768
    text_layers: int = 6
    fusion_layers: int = 6
    text_heads: int = 12
    text_hidden: int = 3072
    embed_dim: int = 256

    def __post_init__(self) -> None:
        if self.image_size < self.patch or self.image_size % self.patch:
            raise UserError(f"image_size must be a multiple of the patch size {self.patch}, got {self.image_size}")
        for name, width, heads in (
            ("image_heads", self.image_width, self.image_heads),
            ("text_heads", self.text_width, self.text_heads),
        ):
            if heads < 1 or width % heads:
                raise UserError(f"{name} must divide the width {width}, got {heads}")

    @classmethod
    def of(
        cls, model: Mapping[str, Tensor], *, image_size: int | None, image_heads: int, text_heads: int, source: str
    ) -> FusionSizes:
        """Read off the tensors of a `FusionCheckpoint`; heads are the one thing that they do not tell.

        image_size: instead of the file's own.
        Raises UserError naming a tensor that is not there.
        """

        def shape(key: str, dims: int = 2) -> tuple[int, ...]:
            if key not in model or model[key].dim() != dims:
                raise UserError(f"{source} is no whole checkpoint: '{key}' is missing or not of {dims} dimensions")
            return tuple(model[key].shape)

        patch, cells = shape(PATCHES, 4)[-1], shape(POSITIONS, 3)[1] - 1
        if math.isqrt(cells) ** 2 != cells:
            raise UserError(f"{source} is no whole checkpoint: its {cells} image positions are no square grid")
        return cls(
            image_size=math.isqrt(cells) * patch if image_size is None else image_size,
            patch=patch,
            image_width=shape(PATCHES, 4)[0],
            image_layers=count(model, "image_tower.blocks."),
            image_heads=image_heads,
            image_hidden=shape("image_tower.blocks.0.mlp.fc1.weight")[0],
            vocabulary=shape("text_tower.embeddings.word_embeddings.weight")[0],
            positions=shape("text_tower.embeddings.position_embeddings.weight")[0],
            text_width=shape("text_tower.embeddings.word_embeddings.weight")[1],
            text_layers=count(model, "text_tower.encoder.layer."),
            fusion_layers=count(model, "fusion.layers."),
            text_heads=text_heads,
            text_hidden=shape("fusion.layers.0.feed_forward.grow.weight")[0],
            embed_dim=shape("image_projection.weight")[0],
        )


def count(model: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the highest number behind `prefix`."""
    return 1 + max((int(key.removeprefix(prefix).split(".")[0]) for key in model if key.startswith(prefix)), default=-1)
