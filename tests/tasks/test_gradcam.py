"""Grad-CAM on cross-attention, against the published steps written out for one text at a time."""

import inspect

import pytest
import torch
from batches import random_batch
from torch import Tensor, nn

from fastmat.errors import UserError
from fastmat.models.albef import Albef
from fastmat.models.fusion_bert import Attention
from fastmat.models.fusion_checkpoint import FusionSizes
from fastmat.models.tiny_fusion import tiny_albef, tiny_blip
from fastmat.tasks.gradcam import attention_maps
from fastmat.tasks.grounding import Grounding


def loud(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Weights so large that attention is no longer uniform."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return model.eval()


def attended(part: Attention, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """One text [L, W] over a source [S, D]: the layer's output [L, W] and its weights [H, L, S]."""
    size = x.shape[1] // part.heads
    spans = [slice(h * size, (h + 1) * size) for h in range(part.heads)]
    queries, keys, values = part.query(x), part.key(source), part.value(source)
    weights = torch.stack([torch.softmax(queries[:, s] @ keys[:, s].T / size**0.5, -1) for s in spans])
    heads = [weights[h] @ values[:, s] for h, s in enumerate(spans)]
    return part.norm(x + part.merge(torch.cat(heads, 1))), weights


def published_map(model: Albef, image: Tensor, text: str, layer: int) -> Tensor:
    """[g, g] for one text alone, which needs no padding and no mask."""
    tokens = model.encode_image(image[None]).tokens[0].detach()
    x = model.encode_text(model.tokenize([text])).tokens[0].detach()
    kept = None
    for number, block in enumerate(model.fusion.layers):
        x, _ = attended(block.attention, x, x)
        x, weights = attended(block.crossattention, x, tokens)
        x = block.feed_forward(x)
        if number == layer:
            kept = weights
            kept.retain_grad()
    model.itm_head(x[0])[1].backward()
    assert kept is not None and kept.grad is not None
    cam, grad = kept.detach()[:, :, 1:], kept.grad[:, :, 1:].clamp(min=0)
    return (cam * grad).mean(0).mean(0).view(4, 4)


@pytest.mark.parametrize("layer", [0, 1])
def test_maps_are_the_published_ones(layer: int) -> None:
    model, batch = loud(tiny_albef()), random_batch()
    maps = attention_maps(model, batch, layer=layer)
    assert maps.shape == (8, 4, 4) and bool((maps >= 0).all()) and float(maps.max()) > 0
    lengths = model.tokenize(batch.texts).mask.sum(1)
    assert len(set(lengths.tolist())) > 1
    for t, text in enumerate(batch.texts):
        alone = published_map(model, batch.images[batch.txt2img[t]], text, layer)
        # Both are means over positions, of which the batch has as many as its longest text.
        torch.testing.assert_close(
            maps[t] * lengths.max() / lengths[t], alone, rtol=1e-4, atol=1e-4 * float(alone.max())
        )


def test_it_leaves_no_trace_and_reads_blip() -> None:
    model, batch = loud(tiny_blip()), random_batch()
    assert attention_maps(model.train(), batch, layer=1).shape == (8, 4, 4)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_default_layer_is_the_published_block() -> None:
    layer = inspect.signature(Grounding).parameters["layer"].default
    assert layer == 8 - FusionSizes().text_layers


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(UserError, match="layer must be 0 to 1, the layers of Albef that look at the image, got 2"):
        attention_maps(tiny_albef(), random_batch(), layer=2)
