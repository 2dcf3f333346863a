"""A model with corrections inside: it offers what the model offers, so every attack runs through them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastmat.alignment.pairs import NAMES
from fastmat.alignment.static import Affine, Subspace, folded
from fastmat.errors import UserError
from fastmat.models.protocol import Encoded, ImageState, TextState, TextTokens, VisionLanguageModel, fuses


class TokensCorrected(nn.Module):
    """A fusion model whose image tokens are corrected before anything fuses them; the rest is the model's own."""

    model: VisionLanguageModel

    def __init__(self, *, model: VisionLanguageModel, correction: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.correction = correction

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def encode_image(self, images: Tensor) -> ImageState:
        state = self.model.encode_image(images)
        assert state.tokens is not None
        return state._replace(tokens=self.correction(state.tokens))

    def forward(self, images: Tensor | None, tokens: TextTokens | None) -> Encoded:
        image = None if images is None else self.encode_image(images)
        text = None if tokens is None else self.model.encode_text(tokens)
        return Encoded(image, text, self.model.logit_scale)


def corrected(model: VisionLanguageModel, corrections: Mapping[str, nn.Module]) -> VisionLanguageModel:
    """A copy of `model` with `corrections`, by site, behind its projections and before its fusion; in eval mode.

    Static corrections are folded into linear projections. Other modules of `corrections` are not copied: what trains
    them later is seen. Raises UserError for tokens in a model that does not fuse.
    """
    assert isinstance(model, nn.Module)
    made = cast("VisionLanguageModel", copy.deepcopy(model).eval())
    if "image" in corrections:
        made.image_projection = behind(made.image_projection, corrections["image"])
    if "text" in corrections:
        made.text_projection = behind(made.text_projection, corrections["text"])
    if "tokens" in corrections:
        check_sites(model, ("tokens",))
        made = cast("VisionLanguageModel", TokensCorrected(model=made, correction=corrections["tokens"]))
    for module in corrections.values():
        module.eval()
    return made


def behind(projection: nn.Module, correction: nn.Module) -> nn.Module:
    """`projection` and then `correction`; one linear layer where they make one."""
    if isinstance(projection, nn.Linear) and isinstance(correction, Affine | Subspace):
        return folded(projection, correction)
    return nn.Sequential(projection, correction)


Texts = dict[bytes, TextState]


def remembering(model: VisionLanguageModel, texts: Texts, *, most: int = 1024) -> VisionLanguageModel:
    """`model`, changed to encode equal batches of captions once, as long as no gradient is asked for.

    texts: what was encoded, to be shared by models with the same text side; `most` batches are kept.
    """
    encode = model.encode_text

    def remembered(tokens: TextTokens) -> TextState:
        if torch.is_grad_enabled() or tokens.shift is not None:
            return encode(tokens)
        key = repr(tuple(tokens.ids.shape)).encode() + tokens.ids.cpu().numpy().tobytes()
        if key in texts:
            return texts[key]
        state = encode(tokens)
        if len(texts) < most:
            texts[key] = state
        return state

    vars(model)["encode_text"] = remembered
    return model


def check_sites(model: VisionLanguageModel, sites: tuple[str, ...]) -> None:
    """Raise UserError for a site that `model` lacks."""
    if "tokens" in sites and not fuses(model):
        raise UserError(
            f"sites: {type(model).__name__} fuses no image tokens, which 'tokens' would correct; keep to image and text"
        )


def check_widths(corrections: Mapping[str, nn.Module], widths: Mapping[str, int], *, source: str) -> None:
    """Raise UserError for a correction made for features of another width. source: where it came from."""
    for site, module in corrections.items():
        if site in widths and module.width != widths[site]:
            raise UserError(
                f"{source} corrects {module.width} channels, but the model's {NAMES[site]} gives {widths[site]}: take "
                "one that was made for this model"
            )
