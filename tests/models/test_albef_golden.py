"""ALBEF against recordings of the official code: both tokenisations, both heads, gradients, another resolution."""

import pytest
import torch
from golden import golden
from golden_models import golden_albef
from torch import Tensor

from fastmat.models.albef import Albef
from fastmat.models.protocol import FusionModel, TextState, TextTokens


def recorded_images(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["images_u8"][:6] / 255


@pytest.mark.parametrize("mode", ["nosep", "sep"])
def test_tokens_states_and_matching(tmp_path, mode: str) -> None:
    said, recorded = golden("albef")
    model = golden_albef(tmp_path, append_sep=mode == "sep")
    assert isinstance(model, FusionModel)
    tokens = model.tokenize(said["texts"], pad=True)
    assert torch.equal(tokens.ids, recorded[f"{mode}.input_ids"])
    assert torch.equal(tokens.mask.long(), recorded[f"{mode}.attention_mask"])
    with torch.no_grad():
        image, text = model.encode_image(recorded_images(recorded)), model.encode_text(tokens)
        near(image.tokens, recorded["image_embed"])
        near(image.features, recorded["image_feat"])
        near(text.tokens, recorded[f"{mode}.text_embed"])
        near(text.features, recorded[f"{mode}.text_feat"])
        fused = model.fuse(image, text)
        near(fused.tokens, recorded[f"{mode}.fusion_output"])
        assert fused.attention is None
        # Every image with every text: each image's keys and values once.
        owner = torch.arange(6).repeat_interleave(6)
        rows = torch.arange(6).repeat(6)
        every = TextTokens(tokens.ids[rows], tokens.mask[rows])
        logits = model.fuse(image, model.encode_text(every), owner).itm_logits
        near(logits.view(6, 6, 2), recorded[f"{mode}.itm_logits_image_by_text"])


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["itm_positive_logit", "cosine"])
def test_gradients_of_images(tmp_path, what: str) -> None:
    said, recorded = golden("albef")
    model = golden_albef(tmp_path).requires_grad_(False)
    images = recorded_images(recorded).requires_grad_(True)
    image = model.encode_image(images)
    text = model.encode_text(model.tokenize(said["texts"]))
    value = model.fuse(image, text).itm_logits[:, 1] if what != "cosine" else (image.features * text.features).sum(1)
    (gradient,) = torch.autograd.grad(value.sum(), images)
    want = recorded[f"grad_image_of_{what}"]
    torch.testing.assert_close(gradient[:2], want, atol=1e-4 * want.abs().max().item(), rtol=0)


def test_another_resolution(tmp_path) -> None:
    recorded = golden("albef")[1]
    model = golden_albef(tmp_path, image_size=96)
    assert model.image_transform.size == 96
    near(model.image_tower.pos_embed, recorded["pos_embed_96"])
    with torch.no_grad():
        image = model.encode_image(recorded["images96_u8"] / 255)
    near(image.tokens, recorded["image_embed_96"])
    near(image.features, recorded["image_feat_96"])


def test_cosines_and_matching_of_many_pairs(tmp_path) -> None:
    """12 images, 44 captions; the recorded scores are ITM logits of the 8 nearest, -100 elsewhere."""
    said, recorded = golden("albef")
    model = golden_albef(tmp_path)
    with torch.no_grad():
        image = model.encode_image(recorded["images_u8"] / 255)
        text = model.encode_text(model.tokenize(said["all_texts"]))
        cosine = image.features @ text.features.T
        near(cosine, recorded["rerank.cosine_i2t"])
        for scores, count in ((recorded["rerank.score_i2t"], 12 * 8), (recorded["rerank.score_t2i"].T, 44 * 8)):
            pairs = (scores > -100).nonzero()
            assert len(pairs) == count
            rows = TextState(*(of[pairs[:, 1]] for of in text))
            near(model.fuse(image, rows, pairs[:, 0]).itm_logits[:, 1], scores[pairs[:, 0], pairs[:, 1]])


def test_scale(tmp_path) -> None:
    weights = golden("albef_weights")[1]
    model: Albef = golden_albef(tmp_path)
    torch.testing.assert_close(model.logit_scale, 1 / weights["temp"])
