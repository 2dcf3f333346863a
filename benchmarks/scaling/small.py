"""The small CLIP whose steps are watched: one shape for the prediction and for the real open_clip module."""

from __future__ import annotations

from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from torch import nn

from fastmat.benchmarks.scaling.shapes import Model, Tower, vit

BATCH = 4  # pairs of one process
PGD_STEPS = 2
TEXT_CALLS = 3  # masked texts, candidates, the chosen text

# Some 12 MB in fp32: more than the first bucket of DDP holds, few enough for seconds.
SMALL = Model(
    name="small CLIP",
    image=vit(side=32, patch=8, layers=4, width=192, embed=64, extra=5 * 192),
    text=Tower(
        layers=4,
        width=128,
        heads=2,
        hidden=512,
        tokens=16,
        embed=64,
        vocabulary=1000,
        positions=16,
        extra=2 * 128,
    ),
    buffers=4 * 16 * 16,
)


def build(model: Model) -> nn.Module:
    """open_clip's module of a CLIP shape, random weights; called as `module(images, ids)`, either may be None."""
    image, text = model.image, model.text
    return CustomTextCLIP(
        embed_dim=model.embed,
        nonscalar_logit_scale=True,  # DeepSpeed refuses parameters without a dimension
        vision_cfg=CLIPVisionCfg(
            layers=image.layers,
            width=image.width,
            head_width=image.width // image.heads,
            patch_size=image.patch,
            image_size=image.side,
        ),
        text_cfg=CLIPTextCfg(
            context_length=text.positions,
            vocab_size=text.vocabulary,
            width=text.width,
            heads=text.heads,
            layers=text.layers,
        ),
    )
