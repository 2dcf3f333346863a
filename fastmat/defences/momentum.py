"""Momentum encoders and queues of their features (ALBEF, NeurIPS 2021, section 3.3; BLIP, ICML 2022; both after MoCo).

They stand beside the model and not in it: what is trained, sharded and saved as the model stays what it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import AttackContext

NOBODY = -100  # the group of what was in a queue before training, as published


class FeatureQueue(nn.Module):
    """The last `size` features added, the oldest replaced first: features [Q, E] unit rows, group [Q] int64.

    At first random directions of nobody, as published: negatives of every row.
    """

    features: Tensor
    group: Tensor

    def __init__(self, *, size: int, width: int, seed: int) -> None:
        super().__init__()
        noise = torch.randn(size, width, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("features", F.normalize(noise, dim=-1))
        self.register_buffer("group", torch.full((size,), NOBODY))
        self.start = 0  # known to the host, so that nothing waits for a device

    @torch.no_grad()
    def add(self, features: Tensor, group: Tensor) -> None:
        """features [N, E], group [N]. Raises UserError for more than the queue holds."""
        size, count = len(self.group), len(group)
        if count > size:
            raise UserError(f"queue must hold at least one batch of all processes, which is {count}; got {size}")
        first = min(count, size - self.start)
        for kept, new in ((self.features, features), (self.group, group)):
            kept[self.start : self.start + first] = new[:first]
            kept[: count - first] = new[first:]
        self.start = (self.start + count) % size

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.start)

    def set_extra_state(self, state: Tensor) -> None:
        self.start = int(state)


class Momentum(nn.Module):
    """A copy of a model that follows it slowly, and the queues of its image and text features.

    model: copied here with all its heads, always in eval mode (published: dropout acts in the copy as well).
    queue: features kept of each modality, over all processes; a multiple of the global batch, as published; 0: none.
    ema_decay: the copy keeps this share of itself in a step.
    Whole in every process, whatever shards the model; `state_dict()` has all that a resumed run needs.
    Raises UserError for a negative queue and a decay outside [0, 1].
    """

    def __init__(
        self, model: VisionLanguageModel, *, queue: int = 65536, ema_decay: float = 0.995, seed: int = 0
    ) -> None:
        super().__init__()
        assert isinstance(model, nn.Module)
        if queue < 0:
            raise UserError(f"queue must not be negative, got {queue}; 0 is no queue")
        if not 0 <= ema_decay <= 1:
            raise UserError(f"ema_decay must be in [0, 1], got {ema_decay}")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        with torch.no_grad():
            width = self.model.encode_text(self.model.tokenize(["a"]).to(model.logit_scale.device)).embeds.shape[1]
        self.images = FeatureQueue(size=queue, width=width, seed=seed)
        self.texts = FeatureQueue(size=queue, width=width, seed=seed + 1)
        self.ema_decay = ema_decay
        self.steps = 0  # batches added
        self.to(model.logit_scale.device)

    @torch.no_grad()
    def follow(self, model: VisionLanguageModel) -> None:
        """One step towards `model`, whose weights are whole here: one call over all of them."""
        assert isinstance(model, nn.Module)
        own: list[Tensor] = list(self.model.parameters())
        towards = [new.detach().view_as(old) for old, new in zip(own, model.parameters(), strict=True)]
        torch._foreach_lerp_(own, towards, 1 - self.ema_decay)

    def check(self, images: int, texts: int) -> None:
        """Raise UserError unless the queue holds a number of whole batches of `images`, and one of `texts`, over all
        processes."""
        size = len(self.images.group)
        if size % images:
            raise UserError(
                f"queue must be a multiple of the global batch of {images} images, got {size}; "
                f"take {max(size // images, 1) * images}, or another batch_size"
            )
        if 0 < size < texts:
            raise UserError(
                f"queue must hold the captions of a global batch, which are {texts}, got {size}; "
                f"take {math.ceil(texts / images) * images}, or fewer captions_per_image"
            )

    def add(self, keys: AttackContext) -> None:
        """The features of a batch of all processes into the queues."""
        self.steps += 1
        if len(self.images.group):
            self.images.add(keys.image_features, keys.image_group)
            self.texts.add(keys.text_features, keys.text_group)

    @torch.no_grad()
    def load_official(self, weights: Mapping[str, Tensor], queues: Mapping[str, Tensor]) -> None:
        """The momentum encoders and queues of an official file, as far as it has them.

        weights: by the model's names, at its resolution; queues: as in the file; `fastmat.models.fusion_checkpoint`
        reads both. Raises UserError for weights or queues of other sizes.
        """
        own = dict(self.model.named_parameters())
        wrong = [key for key, value in weights.items() if key not in own or own[key].shape != value.shape]
        if wrong:
            raise UserError(f"these momentum weights are of another model: {', '.join(sorted(wrong)[:5])}")
        for key, value in weights.items():
            own[key].copy_(value)
        start = next((int(value) for key, value in queues.items() if key in ("queue_ptr", "ptr_queue")), 0)
        for queue, name in ((self.images, "image_queue"), (self.texts, "text_queue")):
            if name not in queues:
                continue
            features = queues[name].T
            if features.shape != queue.features.shape:
                raise UserError(f"{name} of the file holds {len(features)} features; set queue to that")
            queue.features.copy_(features)
            queue.group.copy_(queues["idx_queue"].flatten())
            queue.start = start

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)
