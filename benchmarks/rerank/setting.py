"""A gallery, encoded, whose second stage is measured: random weights in the published sizes, random pixels and words.

Lengths of captions are drawn around Flickr30k's 14 tokens. So that neither shortlists nor ranks are a matter of
rounding, weights of the fusion are enlarged, and features are drawn, a caption's around its image's, with few bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.models.albef import Albef
from fastmat.models.blip import Blip
from fastmat.models.fusion_checkpoint import FusionSizes
from fastmat.models.protocol import ImageState, TextState, TextTokens
from fastmat.models.tiny_fusion import TOKENIZER, tiny_albef, tiny_blip

CAPTIONS = 5
GAIN = 3.0
NOISE = 4.0
# The tokens to which published evaluations pad.
CONTEXT = {"albef": 30, "blip": 35}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """image: tokens on the host, features on the device; text: on the device, padded to the context."""

    model: Albef | Blip
    image: ImageState
    text: TextState
    k: int

    @property
    def plus_cosine(self) -> bool:
        return self.model.ranks_with_cosine

    @property
    def txt2img(self) -> Tensor:
        return torch.arange(len(self.image.features), device=self.text.ids.device).repeat_interleave(CAPTIONS)


def model_of(name: str, *, short: bool) -> Albef | Blip:
    if short:
        return tiny_albef() if name == "albef" else tiny_blip()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "albef":
            return Albef(sizes=FusionSizes(image_size=384), tokenizer=TOKENIZER, context_length=CONTEXT[name])
        sizes = FusionSizes(image_size=384, vocabulary=30524, text_layers=0, fusion_layers=12)
        return Blip(sizes=sizes, tokenizer=TOKENIZER, context_length=CONTEXT[name])


@torch.no_grad()
def prepare(name: str, device: torch.device, *, images: int, k: int, short: bool) -> Setting:
    model = model_of(name, short=short)
    for parameter in [*model.fusion.parameters(), *model.itm_head.parameters()]:
        if parameter.dim() > 1:
            parameter.mul_(GAIN)
    model = model.to(device).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    side, length = model.image_transform.size, CONTEXT[name] if not short else 12
    states = [model.encode_image(torch.rand(1, 3, side, side, generator=generator).to(device)) for _ in range(images)]
    tokens = torch.cat([state.tokens.cpu() for state in states if state.tokens is not None])
    texts = images * CAPTIONS
    pictured = F.normalize(torch.randn(images, model.sizes.embed_dim, generator=generator), dim=-1)
    noise = F.normalize(torch.randn(texts, model.sizes.embed_dim, generator=generator), dim=-1)
    written = F.normalize(pictured.repeat_interleave(CAPTIONS, 0) + NOISE * noise, dim=-1)
    pictured, written = (part.bfloat16().float().to(device) for part in (pictured, written))
    ids = torch.randint(2, model.sizes.vocabulary - 2, (texts, length), generator=generator)
    lengths = (14 + 4 * torch.randn(texts, generator=generator)).round().long().clamp(6, length)
    mask = torch.arange(length) < lengths[:, None]
    text = model.encode_text(TextTokens(ids.where(mask, torch.zeros_like(ids)), mask).to(device))
    return Setting(
        model=model,
        image=ImageState(tokens, pictured, pictured),
        text=text._replace(features=written),
        k=k,
    )
