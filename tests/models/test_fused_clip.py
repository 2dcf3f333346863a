"""A CLIP with a fusion on top keeps what CLIP says, and matches by both ways alike."""

import json
from pathlib import Path

import pytest
import torch

from fastmat.errors import UserError
from fastmat.models.fused_clip import fused_clip
from fastmat.models.open_clip import load_open_clip
from fastmat.models.protocol import FusionModel, fuses

TEXTS = ["a red dog", "two cats on a mat", "a dog"]
CONFIG = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    clip = open_clip.CLIP(**CONFIG["model_cfg"])  # type: ignore[attr-defined]
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def test_it_keeps_what_clip_says(folder: Path) -> None:
    clip, model = load_open_clip(str(folder)).eval(), fused_clip(str(folder)).eval()
    again = fused_clip(str(folder)).eval()
    assert isinstance(model, FusionModel) and fuses(model)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for tokens in (clip.tokenize(TEXTS), clip.tokenize(TEXTS, max_length=4, pad=True)):
            own = model.tokenize(TEXTS) if tokens.ids.shape[1] > 4 else model.tokenize(TEXTS, max_length=4, pad=True)
            assert torch.equal(own.ids, tokens.ids) and torch.equal(own.mask, tokens.mask)
            assert torch.equal(model.encode_text(own).features, clip.encode_text(tokens).features)
        assert torch.equal(model.encode_image(images).features, clip.encode_image(images).features)
        assert torch.allclose(model.logit_scale, clip.logit_scale)
        logits = [each(images, each.tokenize(TEXTS)) for each in (model, again)]
        first, second = (m.fuse(e.image, e.text).itm_logits for m, e in zip((model, again), logits, strict=True))
    assert torch.equal(first, second), "seeded"
    assert model.image_transform == clip.image_transform


def test_both_ways_to_match(folder: Path) -> None:
    model = fused_clip(str(folder), fusion_layers=3, fusion_heads=2, seed=3).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(model.tokenize(TEXTS))
        assert image.tokens is not None and image.tokens.shape == (2, 1 + 16, 64)
        owner = torch.tensor([1, 0, 1])
        fused = model.fuse(image, text, owner).itm_logits
        packed = model.pack_texts(text)
        for row, of in enumerate(owner.tolist()):
            keys = model.image_keys(image.tokens[of][None])
            assert torch.allclose(model.match(keys, packed.take(torch.tensor([row])))[0], fused[row], atol=1e-5)
        assert not torch.allclose(fused[0], model.fuse(image, text, 1 - owner).itm_logits[0]), "the image is looked at"


def test_towers_without_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="RN50 gives no tokens of images"):
        fused_clip("RN50", image_size=32)


def test_heads_that_do_not_divide(folder: Path) -> None:
    with pytest.raises(UserError, match="text_heads must divide the width 32, got 5"):
        fused_clip(str(folder), fusion_heads=5)
