"""BLIP against recordings of the official code: both first tokens of matching, gradients, another resolution."""

import torch
from golden import golden
from golden_models import golden_blip
from torch import Tensor

from fastmat.models.protocol import FusionModel, TextState


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_tokens_states_and_matching(tmp_path) -> None:
    said, recorded = golden("blip")
    model = golden_blip(tmp_path)
    assert isinstance(model, FusionModel)
    tokens = model.tokenize(said["texts"], pad=True)
    assert torch.equal(tokens.ids, recorded["input_ids"])
    assert torch.equal(tokens.mask.long(), recorded["attention_mask"])
    owner, rows = torch.arange(6).repeat_interleave(6), torch.arange(6).repeat(6)
    with torch.no_grad():
        image, text = model.encode_image(recorded["images_u8"][:6] / 255), model.encode_text(tokens)
        near(image.tokens, recorded["image_embeds"])
        near(image.features, recorded["image_feat"])
        near(text.tokens, recorded["text_embeds"])
        near(text.features, recorded["text_feat"])
        every = TextState(*(of[rows] for of in text))
        fused = model.fuse(image, every, owner)
        near(fused.itm_logits.view(6, 6, 2), recorded["itm_logits_image_by_text_enc"])
        near(fused.tokens[:6], recorded["fusion_output_image0_enc"])
        alone = golden_blip(tmp_path, match_token="cls")
        logits = alone.fuse(image, every, owner).itm_logits.view(6, 6, 2)
        near(logits, recorded["itm_logits_image_by_text_cls"])
        near(logits.diagonal().T, recorded["blip_itm_model.itm"])
        near(image.features @ text.features.T, recorded["blip_itm_model.itc"])


def test_another_resolution(tmp_path) -> None:
    recorded = golden("blip")[1]
    model = golden_blip(tmp_path, image_size=96)
    near(model.image_tower.pos_embed, recorded["pos_embed_96"])
    with torch.no_grad():
        near(model.encode_image(recorded["images96_u8"] / 255).tokens, recorded["image_embeds_96"])


def test_matching_plus_cosine_of_many_pairs(tmp_path) -> None:
    """12 images, 40 captions; the recorded scores are ITM logit plus cosine of the 8 nearest, -100 elsewhere."""
    said, recorded = golden("blip")
    model = golden_blip(tmp_path)
    with torch.no_grad():
        image = model.encode_image(recorded["images_u8"] / 255)
        text = model.encode_text(model.tokenize(said["all_texts"]))
        cosine = image.features @ text.features.T
        for scores, count in ((recorded["rerank.score_i2t"], 12 * 8), (recorded["rerank.score_t2i"].T, 40 * 8)):
            pairs = (scores > -50).nonzero()
            assert len(pairs) == count
            rows = TextState(*(of[pairs[:, 1]] for of in text))
            logits = model.fuse(image, rows, pairs[:, 0]).itm_logits[:, 1]
            near(logits + cosine[pairs[:, 0], pairs[:, 1]], scores[pairs[:, 0], pairs[:, 1]])


def test_scale(tmp_path) -> None:
    torch.testing.assert_close(golden_blip(tmp_path).logit_scale, 1 / golden("blip_weights")[1]["temp"])
