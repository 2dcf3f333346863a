"""BLIP without recordings: against transformers' class, from both layouts, and against bad files."""

import re
from pathlib import Path

import pytest
import torch
from batches import random_batch
from tiny_mlm import tiny_candidates, tiny_captions
from torch import Tensor
from transformers import BlipConfig, BlipForImageTextRetrieval

from fastmat import build
from fastmat.attacks.base import context_of
from fastmat.attacks.co_attack import CoAttack
from fastmat.errors import UserError
from fastmat.models.albef import load_albef
from fastmat.models.blip import Blip, load_blip, official_names
from fastmat.models.fusion_checkpoint import FusionCheckpoint, FusionSizes
from fastmat.models.protocol import FusionModel, TextTokens
from fastmat.models.tiny_fusion import tiny_blip
from fastmat.models.weights import save_weights
from fastmat.types import ThreatModel

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "runs", "red", "##s", "on", "snow"]
DEC, ENC = len(PIECES), len(PIECES) + 1
TEXTS = ["a dog", "dogs runs on red snow", "snow"]


def reference(seed: int = 0) -> BlipForImageTextRetrieval:
    """transformers' own, with weights large enough that everything matters."""
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BlipConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6},
        text_config={
            **text,
            "encoder_hidden_size": 24,
            "vocab_size": len(PIECES) + 2,
            "max_position_embeddings": 32,
            "bos_token_id": DEC,
            "pad_token_id": 0,
            "sep_token_id": 3,
        },
        image_text_hidden_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BlipForImageTextRetrieval(config).eval()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
    return model


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    return str(tmp_path / "vocab.txt")


def load(path: Path, vocabulary: str, **settings: object) -> Blip:
    settings = {"context_length": 30, **settings}
    return load_blip(path, vocabulary=vocabulary, image_heads=2, text_heads=2, **settings).eval()


def official(model: BlipForImageTextRetrieval) -> dict[str, Tensor]:
    """Its weights as the official code names them, with what an official file holds beside."""
    state = {}
    for key, value in model.state_dict().items():
        for theirs, ours in (
            ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
            ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
            ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
            ("vision_model.post_layernorm", "visual_encoder.norm"),
            ("vision_model.encoder.layers", "visual_encoder.blocks"),
            ("layer_norm1", "norm1"),
            ("layer_norm2", "norm2"),
            ("self_attn.qkv", "attn.qkv"),
            ("self_attn.projection", "attn.proj"),
        ):
            key = key.replace(theirs, ours)
        state[key] = value
    momentum = {re.sub(r"^(\w+)\.", r"\1_m.", key): value + 1 for key, value in state.items() if "itm_head" not in key}
    queues = {"image_queue": torch.randn(8, 4), "text_queue": torch.randn(8, 4), "idx_queue": torch.zeros(1, 4)}
    ids = torch.arange(32)[None]
    buffers = {f"text_encoder{m}.embeddings.position_ids": ids for m in ("", "_m")} | {"ptr_queue": torch.zeros(1)}
    decoder = {"text_decoder.cls.predictions.bias": torch.zeros(14)}
    return state | momentum | queues | buffers | decoder | {"temp": torch.tensor(0.05)}


@pytest.mark.parametrize("layout", ["transformers", "official"])
def test_equals_transformers_class(tmp_path, vocabulary: str, layout: str) -> None:
    theirs = reference()
    if layout == "transformers":
        theirs.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
    else:
        file = tmp_path / "a.pth"
        torch.save({"model": official(theirs), "epoch": 5}, file)
    model, alone = load(file, vocabulary), load(file, vocabulary, match_token="cls")
    assert isinstance(model, FusionModel)
    assert model.logit_scale.item() == pytest.approx(1 / 0.07 if layout == "transformers" else 20)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    normalised = (images - model.mean) / model.std
    tokens = model.tokenize(TEXTS)
    assert tokens.ids.tolist() == [[2, 5, 6, 3, 0, 0, 0, 0], [2, 6, 9, 7, 10, 8, 11, 3], [2, 11, 3, 0, 0, 0, 0, 0]]
    ids, mask = tokens.ids, tokens.mask.long()
    enc = ids.clone()
    enc[:, 0] = ENC
    with torch.no_grad():
        image, text, *_ = model(images, tokens)
        want = theirs(input_ids=ids, attention_mask=mask, pixel_values=normalised, use_itm_head=False)
        torch.testing.assert_close(image.features @ text.features.T, want.itm_score, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(image.tokens, want.last_hidden_state, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(text.tokens, want.question_embeds, atol=2e-5, rtol=2e-5)
        for one, first in ((model, enc), (alone, ids)):
            fused = one.fuse(image, text)
            want = theirs(input_ids=first, attention_mask=mask, pixel_values=normalised)
            torch.testing.assert_close(fused.itm_logits, want.itm_score, atol=5e-5, rtol=5e-5)
            torch.testing.assert_close(fused.tokens, want.question_embeds, atol=5e-5, rtol=5e-5)


def test_texts_share_the_keys_and_values_of_their_image(tmp_path, vocabulary: str) -> None:
    torch.save(official(reference()), tmp_path / "a.pth")
    model = load(tmp_path / "a.pth", vocabulary)
    text, image = model.encode_text(model.tokenize(TEXTS)), model.encode_image(torch.rand(2, 3, 32, 32))
    owner = torch.tensor([1, 0, 1])
    shared = model.fuse(image, text, owner, True)
    rows = model.fuse(type(image)(*(of[owner] for of in image)), text)
    torch.testing.assert_close(shared.tokens, rows.tokens, atol=2e-5, rtol=2e-5)
    assert shared.attention is not None and [tuple(of.shape) for of in shared.attention] == [(3, 2, 8, 17)] * 2
    gradients = torch.autograd.grad(shared.itm_logits[:, 1].sum(), shared.attention)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_a_shift_moves_the_embeddings_of_the_tokens(tmp_path, vocabulary: str) -> None:
    torch.save(official(reference()), tmp_path / "a.pth")
    model = load(tmp_path / "a.pth", vocabulary)
    tokens = model.tokenize(["a dog", "on snow"])
    words = model.token_embedding.weight
    moved = TextTokens(tokens.ids[:1], tokens.mask[:1], (words[tokens.ids[1]] - words[tokens.ids[0]])[None])
    torch.testing.assert_close(model.encode_text(moved).embeds, model.encode_text(tokens).embeds[1:])


def test_another_resolution(tmp_path, vocabulary: str) -> None:
    torch.save(official(reference()), tmp_path / "a.pth")
    model = load(tmp_path / "a.pth", vocabulary, image_size=48)
    assert model.sizes.image_size == model.image_transform.size == 48
    assert model.image_tower.pos_embed.shape == (1, 37, 24)


def test_attacks_take_it_as_it_is() -> None:
    """The fusion form of Co-Attack ends higher than it began."""
    model = tiny_blip(seed=2).eval()
    for parameter in model.parameters():
        parameter.data.mul_(10 if parameter.dim() > 1 else 1)  # from the narrow start that training wants
    batch = random_batch((2, 1)).replace(texts=tuple(tiny_captions(3, seed=3)))
    threat = ThreatModel(eps=16 / 255, max_words=1)
    attack = CoAttack(threat=threat, candidates=tiny_candidates(), representation="fusion", steps=4)
    result = attack(model, batch)
    value = attack.bind(model, batch, context_of(model, batch), result.texts)
    with torch.no_grad():
        assert (value(model.encode_image(result.images)) > value(model.encode_image(batch.images))).all()
    assert result.texts != batch.texts


def test_what_fastmat_saves_it_loads_on_top(tmp_path, vocabulary: str) -> None:
    torch.save(official(reference()), tmp_path / "a.pth")
    model = load(tmp_path / "a.pth", vocabulary)
    model.itm_head.bias.data += 1
    save_weights(model, tmp_path / "own.safetensors")
    arguments = {"checkpoint": str(tmp_path / "a.pth"), "vocabulary": vocabulary, "image_heads": 2, "text_heads": 2}
    arguments["context_length"] = 30
    component = {"name": "blip", **arguments, "weights": str(tmp_path / "own.safetensors")}
    again = build.build_model(build.parse(component, build.MODELS, where="model"))
    assert isinstance(again, Blip) and torch.equal(again.itm_head.bias, model.itm_head.bias)


def test_keys_of_the_published_size() -> None:
    """As transformers has them, whose defaults are the published sizes."""
    sizes = FusionSizes(vocabulary=30524, text_layers=0, fusion_layers=12)
    with torch.device("meta"):
        model = Blip(sizes=sizes, tokenizer=tiny_blip().tokenizer, context_length=35)
        theirs = BlipForImageTextRetrieval(BlipConfig(text_config={"encoder_hidden_size": 768}))
    want = FusionCheckpoint.of(official_names(theirs.state_dict()), first=0).at(sizes).model
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in want.items()}


def test_bad_files_and_settings(tmp_path, vocabulary: str) -> None:
    state = official(reference())
    torch.save({**state, "stranger.weight": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"1 unexpected \(stranger\.weight\)"):
        load(tmp_path / "a.pth", vocabulary)
    torch.save({key: value for key, value in state.items() if key not in ("temp", "itm_head.bias")}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"2 missing \(itm_head\.bias, temp\)"):
        load(tmp_path / "a.pth", vocabulary)
    late = {k: v for k, v in state.items() if not re.search(r"layer\.0\.crossattention", k)}
    torch.save(late, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"no BLIP checkpoint: the first 1 layers .* as ALBEF's"):
        load(tmp_path / "a.pth", vocabulary)
    torch.save({"logit_scale": torch.ones(())}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="no layer of a text encoder in it looks at an image"):
        load(tmp_path / "a.pth", vocabulary)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="looks at the image from its first layer on, as BLIP's"):
        load_albef(tmp_path / "a.pth", vocabulary=vocabulary)
    with pytest.raises(UserError, match="match_token must be one of enc, cls, got 'sep'"):
        load(tmp_path / "a.pth", vocabulary, match_token="sep")
    with pytest.raises(UserError, match="context_length must be between 3 and the model's 32, got 35"):
        load_blip(tmp_path / "a.pth", vocabulary=vocabulary, image_heads=2, text_heads=2)
    Path(vocabulary).write_text("\n".join([*PIECES, "[DEC]", "[ENC]"]) + "\n")
    load(tmp_path / "a.pth", vocabulary)
    Path(vocabulary).write_text("\n".join([*PIECES, "cat"]) + "\n")
    with pytest.raises(UserError, match="has 13 pieces, the model 14"):
        load(tmp_path / "a.pth", vocabulary)
