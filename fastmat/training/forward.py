"""All views of a batch through one forward of the wrapped module, so that gradients synchronise once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.defences.base import Features, Pairs, Views
from fastmat.models.protocol import Encoded, FusionState, ImageState, TextState, TextTokens, VisionLanguageModel
from fastmat.training.fusing import to_fuse
from fastmat.training.peers import Peers
from fastmat.types import Batch

Forward = Callable[..., Encoded]  # of (images, tokens), and what selects pairs to fuse where there are any


def encode_views(
    forward: Forward,
    model: VisionLanguageModel,
    views: Views,
    batch: Batch,
    *,
    peers: Peers | None = None,
    texts: tuple[int, ...] = (),
) -> Features:
    """Encode every view with gradients.

    forward: the prepared module, called once as `forward(images, tokens)` with the views stacked, and with what
    `views.match` selects where there is such; `model` (unwrapped) only tokenises. The result holds each view apart
    again, embeddings and features in fp32; with several `peers`, those of everyone beside them. texts: how many each
    process has, by rank, from `Peers.shared`. Without `peers` this process is alone.
    """
    if peers is None:
        peers, texts = Peers(rank=0, world=1, device=batch.images.device), (len(batch.texts),)
    images = torch.cat(list(views.images.values())) if views.images else None
    tokens = None
    if views.texts:
        captions = [text for view in views.texts.values() for text in view]
        # Borrowed rows are equally long in all processes; padded to the context, nobody needs to ask how long.
        pad = views.borrows and peers.world > 1
        tokens = model.tokenize(captions, pad=pad).to(batch.images.device)
        tokens = tokens._replace(shift=_stacked_shift(views, tokens))
    if views.match is None:
        return peers.joined(apart(forward(images, tokens), views, batch), texts)
    match, chosen = views.match, dict[str, Pairs]()

    def select(encoded: Encoded) -> tuple[ImageState, TextState, Tensor]:
        with torch.no_grad():
            chosen.update(match(peers.joined(apart(encoded, views, batch), texts)))
        return to_fuse(encoded, views, chosen.values(), peers, texts)

    encoded = forward(images, tokens, select)
    assert encoded.fused is not None
    lengths = [len(pairs.text_rows) for pairs in chosen.values()]
    columns = zip(encoded.fused.tokens.split(lengths), encoded.fused.itm_logits.split(lengths), strict=True)
    fused = {name: FusionState(*part, attention=None) for name, part in zip(chosen, columns, strict=True)}
    return peers.joined(replace(apart(encoded, views, batch), fused=fused), texts)


def apart(encoded: Encoded, views: Views, batch: Batch) -> Features:
    """The stacked views, each by its name."""
    image_states: list[ImageState] = []
    if encoded.image is not None:
        image = encoded.image._replace(embeds=encoded.image.embeds.float(), features=encoded.image.features.float())
        image_states = [ImageState(*part) for part in _split(image, len(batch), len(views.images))]
    text_states: list[TextState] = []
    if encoded.text is not None:
        text = encoded.text._replace(embeds=encoded.text.embeds.float(), features=encoded.text.features.float())
        text_states = [TextState(*part) for part in _split(text, len(batch.texts), len(views.texts))]
    return Features(
        images=dict(zip(views.images, image_states, strict=True)),
        texts=dict(zip(views.texts, text_states, strict=True)),
        targets=views.targets,
        logit_scale=encoded.logit_scale.float(),
        group=batch.group,
        text_group=batch.text_group,
    )


def _stacked_shift(views: Views, tokens: TextTokens) -> Tensor | None:
    """[rows of all text views, L, D]: each view's shift in its rows, zeros elsewhere; None where nothing is shifted."""
    if not views.shifts:
        return None
    width = next(iter(views.shifts.values())).shape[2]
    none = torch.zeros(len(tokens.ids) // len(views.texts), 0, width, device=tokens.ids.device)
    shifts = [views.shifts.get(name, none) for name in views.texts]
    return torch.cat([F.pad(shift, (0, 0, 0, tokens.ids.shape[1] - shift.shape[1])) for shift in shifts])


def _split(parts: Sequence[Tensor | None], rows: int, views: int) -> list[tuple]:
    """Stacked tensors (or None where a tower has none) to one tuple per view."""
    columns = [[None] * views if part is None else part.split(rows) for part in parts]
    return list(zip(*columns, strict=True))
