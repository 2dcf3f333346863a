"""Exported folders, loaded by their libraries as anybody would: the features are those of the trained model."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from fastmat.errors import UserError
from fastmat.models.export import check_same, export_hf_clip, export_open_clip
from fastmat.models.hf_clip import load_hf_clip
from fastmat.models.open_clip import load_open_clip
from fastmat.models.weights import save_weights

TEXTS = ["a dog", "two dogs run over the green grass"]
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
CONFIGS = {
    "vit": {"vision_cfg": VIT, "text_cfg": TEXT},
    "custom": {"vision_cfg": VIT, "text_cfg": TEXT, "custom_text": True, "quick_gelu": True},
    "siglip": {
        "vision_cfg": VIT,
        "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        "custom_text": True,
        "init_logit_bias": -10,
    },
    "timm": {
        "vision_cfg": {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32},
        "text_cfg": TEXT,
    },
    "resnet": {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, "text_cfg": TEXT},
}


def scrambled(model: torch.nn.Module) -> torch.nn.Module:
    """As if it had been trained: every parameter another one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model.eval()


def clip_folder(folder: Path, config: dict) -> Path:
    preprocess = {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.25],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    folder.mkdir()
    told = {"model_cfg": {"embed_dim": 16, **config}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_weights(clip, folder / "open_clip_model.safetensors")
    return folder


def transformers_folder(folder: Path) -> Path:
    folder.mkdir()
    tower = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    pieces = ["!", *"adogrunstwh", *(f"{letter}</w>" for letter in "adogrunstwh"), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 12, "eos_token_id": len(vocabulary) - 1}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(text_config={**tower, **text}, vision_config=vision, projection_dim=8))
    clip.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32, image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder)
    CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", list(CONFIGS))
def test_open_clip_loads_it_unchanged(tmp_path: Path, name: str) -> None:
    start, out = clip_folder(tmp_path / "start", CONFIGS[name]), tmp_path / "out"
    model = scrambled(load_open_clip(str(start)))
    out.mkdir()
    check_same(model, export_open_clip(model.state_dict(), out, architecture=str(start)))
    assert sorted(path.name for path in out.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
    clip, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    original = open_clip.create_model(f"local-dir:{start}")
    assert type(clip) is type(original) and clip.state_dict().keys() == original.state_dict().keys()
    images = torch.rand(2, 3, 32, 32)
    normalised = preprocess.transforms[-1](images)
    clip.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            clip.encode_image(normalised), model.encode_image(images).embeds, atol=1e-5, rtol=1e-4
        )
        tokens = open_clip.get_tokenizer(f"local-dir:{out}")(TEXTS)
        want = model.encode_text(model.tokenize(TEXTS)).embeds
        torch.testing.assert_close(clip.encode_text(tokens), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(clip.logit_scale.exp(), model.logit_scale)
    assert name != "siglip" or clip.logit_bias.item() == -10


def test_transformers_loads_it_unchanged(tmp_path: Path) -> None:
    start, out = transformers_folder(tmp_path / "start"), tmp_path / "out"
    model = scrambled(load_hf_clip(str(start)))
    out.mkdir()
    check_same(model, export_hf_clip(model.state_dict(), out, path=str(start)))
    assert not list(out.glob("*.bin"))
    clip, info = CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = CLIPProcessor.from_pretrained(out)
    picture = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    given = processor(text=["a dog", "two dogs run"], images=picture, return_tensors="pt", padding=True)
    with torch.no_grad():
        found = clip.eval()(**given)
        scale = model.logit_scale
        image = model.encode_image(picture[None] / 255).features
        text = model.encode_text(model.tokenize(["a dog", "two dogs run"])).features
    torch.testing.assert_close(found.logits_per_image, scale * image @ text.T, atol=1e-4, rtol=1e-4)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    start = clip_folder(tmp_path / "start", CONFIGS["vit"])
    state = dict(load_open_clip(str(start)).state_dict())
    state.pop("text_projection.weight")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"missing \(text.text_projection\)"):
        export_open_clip(state, tmp_path / "out", architecture=str(start))


def test_a_difference_is_noticed(tmp_path: Path) -> None:
    start = clip_folder(tmp_path / "start", CONFIGS["vit"])
    model, other = load_open_clip(str(start)), load_open_clip(str(start))
    check_same(model, other)
    with torch.no_grad():
        other.text_projection.weight[0, 0] += 0.5
    with pytest.raises(UserError, match="gives captions other features"):
        check_same(model, other)
