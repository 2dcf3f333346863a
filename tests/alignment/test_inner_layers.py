"""Layers of both encoders against forwards by hand; which modules are layers."""

import torch
from torch import Tensor, nn

from fastmat.alignment.layers import image_layers, pooled, repetition, stacked, text_layers
from fastmat.models.small_fusion import small_fusion
from fastmat.models.tiny import tiny_clip
from fastmat.models.tiny_fusion import tiny_albef

TEXTS = ["a red dog", "two", "the blue cat sits", "a"]


def test_image_layers_by_hand() -> None:
    model = tiny_clip()
    images = torch.rand(5, 3, 32, 32)
    found = image_layers(model, images.split(2))
    assert list(found) == ["block 1", "block 2", "projection input", "projection output"]
    x = (images - model.mean) / model.std
    blocks = model.image_tower.blocks
    first, second = blocks[:3](x), blocks(x)
    assert torch.allclose(found["block 1"], first.mean((2, 3)), atol=1e-5)
    assert torch.allclose(found["block 2"], second.mean((2, 3)), atol=1e-5)
    assert torch.allclose(found["projection input"], second.flatten(1), atol=1e-5)
    assert torch.allclose(found["projection output"], model.encode_image(images).embeds, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_padding_does_not_count() -> None:
    model = small_fusion(vocabulary=None, width=16, widths=(8, 8), heads=2)
    together, alone = text_layers(model, [TEXTS]), text_layers(model, [[text] for text in TEXTS])
    assert list(together) == ["block 1", "block 2", "projection input", "projection output"]
    for name in together:
        assert torch.allclose(together[name], alone[name], atol=1e-5), name


def test_a_fusion_model_has_tokens() -> None:
    model = tiny_albef()
    size = model.image_transform.size
    images = torch.rand(3, 3, size, size)
    found = image_layers(model, [images])
    state = model.eval().encode_image(images)
    assert torch.allclose(found["tokens to fusion"], state.tokens.mean(1), atol=1e-5)
    assert [name for name in found if name.startswith("block")]
    assert torch.allclose(found["projection input"], state.tokens[:, 0], atol=1e-5)


class SequenceFirst(nn.Module):
    """A tower whose blocks see [L, N, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        x = images.flatten(1)[:, :24].view(-1, 6, 4).transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return x.mean(0), None


def test_sequence_first() -> None:
    model = tiny_clip()
    model.image_tower = SequenceFirst()
    model.image_projection = nn.Linear(4, 16)
    images = torch.rand(6, 3, 32, 32)  # as many as tokens: only a look at two rows can tell
    found = image_layers(model, [images])
    assert torch.allclose(found["block 2"], found["projection input"], atol=1e-5)


def test_what_is_a_layer() -> None:
    conv = [nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3), nn.ReLU()]
    assert len(stacked(nn.Sequential(*conv, *conv))) == 2
    assert stacked(nn.Sequential(*conv)) == [] and stacked(nn.Sequential(nn.ReLU(), nn.ReLU())) == []
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    outer = nn.Sequential(inner, inner, inner)
    assert stacked(outer) == [inner] * 3, "the outermost list counts"
    assert repetition("abcabcabc") == 3 and repetition("aab") == 0
    assert pooled(torch.ones(2, 3, 4, 5)).shape == (2, 3)
