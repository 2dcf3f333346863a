"""A model whose images pass a guard first: itself a model, so that whatever attacks or judges models runs through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.engine import active
from fastmat.errors import UserError
from fastmat.guards.base import Guard
from fastmat.models.protocol import Encoded, ImageState, TextTokens, VisionLanguageModel, unguarded

PROJECTIONS = ("image_projection", "text_projection")


class Guarded(nn.Module):
    """`model` behind `guard`. All that is not said here is the model's own: texts, fusion, re-ranking, its attributes.

    draws: how often a random guard is asked about an image; its states are the mean over all, in one forward of
        draws * B images. A guard that draws nothing is asked once.
    seed: of the guard's draws. They are fresh in every call, and the same again after `rewind`; the global random
        state is neither read nor changed.

    A defence is deployed with `draws=1`. To attack it adaptively, more stand for the expectation over its randomness
    (EOT; Athalye et al., ICML 2018, section 3): `features` are the mean of unit rows, not of unit length themselves, so
    that a cosine is the mean cosine of the draws. For what is linear in `features` or `embeds` (the objective `cosine`,
    SGA's) the gradient is then exactly the mean of the draws' gradients. For what is not (`contrastive`, `margin`, KL,
    distances, a fusion) it is the gradient of the loss of the mean, which is another thing; there `draws=1` gives an
    unbiased gradient of the expected loss in every step, and more draws one with less noise. `generate` asks once.

    Raises UserError for draws below 1, and where a random guard runs inside a CUDA graph, which would replay one draw.
    """

    def __init__(self, *, model: VisionLanguageModel, guard: Guard, draws: int = 1, seed: int = 0) -> None:
        super().__init__()
        if draws < 1:
            raise UserError(f"draws must be at least 1, got {draws}: it is how often a random guard is asked per image")
        self.model = model
        self.guard = guard
        self.draws = draws if guard.random else 1
        self.seed = seed
        self.rewind()

    def rewind(self) -> None:
        """Draw from the beginning."""
        self.calls = 0

    @property
    def unguarded(self) -> VisionLanguageModel:
        return unguarded(self.model)

    def __getattr__(self, name: str) -> Any:
        """Called for what is not found here: a capability is there where the model has it, and absent where not."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(super().__getattr__("model"), name)
        return (lambda images: found(self.guarded(images))) if name == "generate" else found

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PROJECTIONS:
            setattr(self.model, name, value)
        else:
            super().__setattr__(name, value)

    def encode_image(self, images: Tensor) -> ImageState:
        """The mean of the states of [draws * B, 3, H, W] guarded images."""
        if self.draws == 1:
            return self.model.encode_image(self.guarded(images))
        state = self.model.encode_image(self.guarded(images.repeat(self.draws, 1, 1, 1)))
        tokens, embeds, features = (
            None if part is None else part.unflatten(0, (self.draws, len(images))).mean(0) for part in state
        )
        assert embeds is not None and features is not None
        return ImageState(tokens=tokens, embeds=embeds, features=features)

    def forward(self, images: Tensor | None, tokens: TextTokens | None) -> Encoded:
        image = None if images is None else self.encode_image(images)
        text = None if tokens is None else self.model.encode_text(tokens)
        return Encoded(image, text, self.model.logit_scale)

    @torch.compiler.disable  # the seed of the draws is new in every call, and would be compiled anew
    def guarded(self, images: Tensor) -> Tensor:
        """What the model gets to see of [B, 3, H, W]; drawn anew in every call."""
        if self.guard.random and active().cuda_graph:
            raise UserError("a random guard cannot run in a CUDA graph, which replays one draw: leave cuda_graph off")
        draws = SeededDraws((self.seed << 32) + self.calls)
        self.calls += 1
        with torch.autocast(images.device.type, enabled=False):  # pixels stay fp32
            return self.guard(images, encode=lambda x: self.model.encode_image(x).embeds, draws=draws)
