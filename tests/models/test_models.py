import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from fastmat.errors import UserError
from fastmat.models.hf_clip import load_hf_clip
from fastmat.models.open_clip import TimmTower, load_open_clip
from fastmat.models.protocol import FusionModel, VisionLanguageModel
from fastmat.models.tiny import tiny_clip
from fastmat.models.weights import load_weights, read_state, save_weights, weights_hash
from fastmat.types import ImageTransform

TEXTS = ["a dog runs", "two small dogs run over the green grass", "a"]


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    """A random ViT CLIP in open_clip's own layout, as `open_clip.push_to_hf_hub` would write it."""
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
            "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
        },
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "resize_mode": "shortest"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_weights(clip, folder / "open_clip_model.safetensors")
    return folder


def test_open_clip_folder_gives_the_library_s_embeddings(open_clip_folder) -> None:
    model = load_open_clip(str(open_clip_folder)).eval()
    assert isinstance(model, VisionLanguageModel) and not isinstance(model, FusionModel)
    clip = open_clip.create_model(f"local-dir:{open_clip_folder}").eval()
    images = torch.rand(2, 3, 32, 32)
    normalised = (images - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    with torch.no_grad():
        image, text, scale, _ = model(images, model.tokenize(TEXTS))
        torch.testing.assert_close(image.embeds, clip.encode_image(normalised), atol=1e-5, rtol=1e-4)
        padded = open_clip.get_tokenizer(f"local-dir:{open_clip_folder}")(TEXTS)
        torch.testing.assert_close(text.embeds, clip.encode_text(padded), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(scale, clip.logit_scale.exp())
    assert image.tokens.shape == (2, 16, 32) and text.tokens.shape[:2] == text.ids.shape
    torch.testing.assert_close(image.features.norm(dim=1), torch.ones(2))
    assert model.image_transform.mode == "crop"


def test_projection_is_replaceable(open_clip_folder) -> None:
    model = load_open_clip(str(open_clip_folder)).eval()
    images = torch.rand(1, 3, 32, 32)
    before = model.encode_image(images).embeds
    model.image_projection = torch.nn.Sequential(model.image_projection, torch.nn.Hardtanh(-1e-3, 1e-3))
    assert model.encode_image(images).embeds.abs().max() <= 1e-3 < before.abs().max()


def test_transformers_folder_gives_the_library_s_embeddings(tmp_path) -> None:
    tower = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    vocabulary = ["!", "a", "d", "o", "g", "r", "u", "n", "s", "t", "w", "o</w>", "a</w>", "g</w>", "s</w>", "n</w>"]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 12, "eos_token_id": len(vocabulary) - 1}
    config = CLIPConfig(
        text_config={**tower, **text}, vision_config={**tower, "image_size": 32, "patch_size": 16}, projection_dim=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32, resample=2).save_pretrained(tmp_path)
    CLIPTokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    model = load_hf_clip(str(tmp_path)).eval()
    assert isinstance(model, VisionLanguageModel)
    assert model.image_transform == ImageTransform(size=32, mode="crop", interpolation="bilinear")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        want = clip.get_image_features(pixel_values=(images - model.mean) / model.std).pooler_output
        torch.testing.assert_close(model.encode_image(images).embeds, want, atol=1e-5, rtol=1e-4)
        tokens = model.tokenize(["a dog", "two dogs run"])
        want = clip.get_text_features(input_ids=tokens.ids).pooler_output
        torch.testing.assert_close(model.encode_text(tokens).embeds, want, atol=1e-5, rtol=1e-4)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="no CLIP model could be loaded"):
        load_hf_clip(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="no CLIP model could be loaded"):
        load_hf_clip(str(tmp_path))


class FakeTrunk(torch.nn.Module):
    """A 2 x 3 map of 4 channels whose values tell where they stand, laid out as timm's `output_fmt` says."""

    def __init__(self, output_fmt: str) -> None:
        super().__init__()
        self.output_fmt = output_fmt

    def forward_features(self, images):
        cells = torch.arange(24.0).view(1, 2, 3, 4)
        return cells if self.output_fmt == "NHWC" else cells.permute(0, 3, 1, 2)

    def forward_head(self, grid):
        return grid.flatten(1)[:, :4]


@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
def test_timm_tokens_are_the_cells_of_the_map(output_fmt: str) -> None:
    visual = torch.nn.Module()
    visual.trunk, visual.head = FakeTrunk(output_fmt), torch.nn.Sequential()
    visual.head.proj = torch.nn.Linear(4, 2)
    _, tokens = TimmTower(visual)(torch.zeros(1, 3, 8, 8))
    assert torch.equal(tokens, torch.arange(24.0).view(1, 6, 4))


def test_padding_changes_nothing() -> None:
    model = tiny_clip().eval()
    with torch.no_grad():
        together = model.encode_text(model.tokenize(TEXTS)).features
        alone = torch.cat([model.encode_text(model.tokenize([text])).features for text in TEXTS])
        full = model.encode_text(model.tokenize(TEXTS, pad=True)).features
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together, full, atol=1e-6, rtol=0)
    assert model.tokenize(TEXTS, max_length=4).ids.shape == (3, 4)
    assert model.tokenize([]).ids.shape[0] == 0


def test_images_of_another_resolution_are_resized_inside() -> None:
    model = tiny_clip(image_size=32).eval()
    assert model.encode_image(torch.rand(2, 3, 48, 48)).features.shape == (2, 16)


def test_tiny_models_are_seeded_and_leave_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    assert weights_hash(tiny_clip(seed=1)) == weights_hash(tiny_clip(seed=1)) != weights_hash(tiny_clip(seed=2))
    assert torch.equal(state, torch.get_rng_state())


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'ViT-B-16'"):
        load_open_clip("ViT-B16")
    with pytest.raises(UserError, match="did you mean 'openai'"):
        load_open_clip("ViT-B-32", pretrained="opnai")


@pytest.mark.parametrize(("mode", "name"), [("crop", "shortest"), ("squash", "squash")])
@pytest.mark.parametrize("shape", [(97, 64), (64, 97), (61, 40), (40, 40), (333, 41), (20, 31)])
def test_pictures_are_resized_as_open_clip_does(shape, mode, name) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    theirs = open_clip.image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=name)
    want = theirs(Image.fromarray(pixels)).mul(255).round().to(torch.uint8)
    assert torch.equal(ImageTransform(size=32, mode=mode)(Image.fromarray(pixels)), want)


def test_equal_weights_and_metadata_give_equal_files(tmp_path) -> None:
    told = {"d": 1, "a": {"z": [1, 2], "b": "ü"}, "c": None, "b": 2.5}
    backwards = dict(reversed(told.items()))
    for n, metadata in enumerate([told, backwards] * 4):
        save_weights(tiny_clip(), tmp_path / f"{n}.safetensors", metadata=metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert json.loads(file.metadata()["fastmat"]) == told


def test_weights_that_do_not_fit_are_listed(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(tiny_clip(image_size=64), path)
    with pytest.raises(UserError, match=r"1 of another shape \(image_projection.weight\)"):
        load_weights(tiny_clip(image_size=32), path)
    state = {"a": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"missing \(image_projection.weight.*1 unexpected \(a\)"):
        load_weights(tiny_clip(), tmp_path / "other.pt")


class Bomb:
    def __reduce__(self):
        return (open, ("/dev/null",))


def test_files_with_code_or_damage_are_refused(tmp_path) -> None:
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="carries code, which is never run"):
        read_state(tmp_path / "bomb.pt")
    for damaged in (b"\x80\x02a", b"\x80\x04K\x01.", b"\xf0h", b"(lp0\n", bytes(40)):
        (tmp_path / "damaged.pt").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            read_state(tmp_path / "damaged.pt")
    save_weights(tiny_clip(), tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:500])
    with pytest.raises(UserError, match=r"cut.safetensors is not a whole safetensors file"):
        read_state(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        read_state(tmp_path / "none.safetensors")
