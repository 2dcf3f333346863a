"""A hardened model as a folder that its own library loads unchanged: configuration, tokenizer, safetensors.

`taken_back` undoes what `take_apart` of `fastmat.models.open_clip` or `fastmat.models.hf_clip` did to the names and
shapes of the weights; everything else is the library's own, written by it or as it writes it.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CustomTextCLIP
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from fastmat.errors import UserError
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.hf_clip import load_hf_clip
from fastmat.models.open_clip import load_open_clip, make_open_clip
from fastmat.models.weights import load_state

# What tokenizers of transformers leave in a folder.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model")


def export_open_clip(
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    architecture: str,
    pretrained: str | None = None,
    image_size: int | None = None,
) -> DualEncoder:
    """Write `open_clip_config.json` and `open_clip_model.safetensors` into `folder`, and load them from there.

    state: of the DualEncoder that `load_open_clip` makes of the same arguments. Loaded by
    `open_clip.create_model_from_pretrained("local-dir:FOLDER")` or, once uploaded, "hf-hub:NAME".
    Raises UserError where the weights are not those of the architecture.
    """
    clip = make_open_clip(architecture, pretrained=pretrained, image_size=image_size)
    config = open_clip_config(clip, architecture, image_size=image_size)
    own = taken_back(state, clip)
    load_state(clip, own, source="the trained model")
    if not config["model_cfg"].get("custom_text") and "hf_model_name" not in config["model_cfg"]["text_cfg"]:
        own = {key.removeprefix("text."): value for key, value in own.items()}  # as the library's plain CLIP has them
    save_file({k: v.detach().contiguous().clone() for k, v in own.items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    if Path(architecture).is_dir():
        for pattern in TOKENIZER_FILES:
            for file in Path(architecture).glob(pattern):
                shutil.copy(file, folder / file.name)
    elif "hf_tokenizer_name" in config["model_cfg"]["text_cfg"]:
        open_clip.get_tokenizer(architecture).tokenizer.save_pretrained(folder)
    return load_open_clip(str(folder))


def export_hf_clip(state: Mapping[str, Tensor], folder: Path, *, path: str) -> DualEncoder:
    """Write a `CLIPModel` with tokenizer and image processor into `folder`, and load it from there.

    state: of the DualEncoder that `load_hf_clip` makes of `path`. Loaded by `CLIPModel.from_pretrained(FOLDER)`.
    Raises UserError where the weights are not those of the model.
    """
    load_hf_clip(path)  # its own checks, and its own sentences
    clip = CLIPModel.from_pretrained(path).float()
    names = {
        "image_tower.vision_model.": "vision_model.",
        "image_projection.": "visual_projection.",
        "text_tower.text_model.": "text_model.",
        "text_projection.": "text_projection.",
    }
    own = {renamed(key, {**names, "log_logit_scale": "logit_scale"}): value for key, value in state.items()}
    load_state(clip, own, source="the trained model")
    clip.save_pretrained(folder, safe_serialization=True)
    CLIPTokenizer.from_pretrained(path).save_pretrained(folder)
    CLIPImageProcessor.from_pretrained(path).save_pretrained(folder)
    return load_hf_clip(str(folder))


def taken_back(state: Mapping[str, Tensor], clip: CustomTextCLIP) -> dict[str, Tensor]:
    """The weights of a DualEncoder by open_clip's names for `clip`, in its shapes.

    What a DualEncoder does not have, as SigLIP's bias of the logits, is that of `clip`.
    """
    own = clip.state_dict()
    names = {
        "image_tower.visual.": "visual.",
        "text_tower.text.": "text.",
        "image_projection.weight": "visual.proj" if "visual.proj" in own else "visual.head.proj.weight",
        "image_projection.": "visual.head.proj.",
        "text_projection.weight": "text.text_projection" + ("" if "text.text_projection" in own else ".weight"),
        "text_projection.": "text.text_projection.",
        "log_logit_scale": "logit_scale",
    }
    found = {key: value for key, value in own.items() if key == "logit_bias"}
    for key, value in state.items():
        name = renamed(key, names)
        if key.endswith("_projection.weight") and not name.endswith("weight"):
            value = value.T  # a [in, out] matrix there
        found[name] = value.reshape(own[name].shape) if name == "logit_scale" else value
    return found


def renamed(key: str, names: Mapping[str, str]) -> str:
    """`key` with another beginning."""
    for ours, theirs in names.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def open_clip_config(clip: CustomTextCLIP, architecture: str, *, image_size: int | None) -> dict[str, Any]:
    """What `open_clip_config.json` holds for this model."""
    folder = Path(architecture)
    if folder.is_dir():
        model = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    elif architecture.startswith("hf-hub:"):
        from open_clip.factory import _get_hf_config

        model = _get_hf_config(architecture.removeprefix("hf-hub:"))["model_cfg"]
    else:
        model = copy.deepcopy(open_clip.get_model_config(architecture))
    if image_size is not None:
        model["vision_cfg"]["image_size"] = image_size
    for tower, key in (("vision_cfg", "timm_model_pretrained"), ("text_cfg", "hf_model_pretrained")):
        if key in model[tower]:
            model[tower][key] = False  # the weights are beside it
    wanted = ("mean", "std", "interpolation", "resize_mode")
    return {"model_cfg": model, "preprocess_cfg": {key: clip.visual.preprocess_cfg[key] for key in wanted}}


@torch.no_grad()
def check_same(model: DualEncoder, exported: DualEncoder) -> None:
    """Raise UserError unless both give an image and captions the same features, to rounding."""
    assert isinstance(model, nn.Module) and isinstance(exported, nn.Module)
    model, exported = model.eval(), exported.eval()
    size = model.image_transform.size
    image = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    captions = ["a dog runs over the green grass", "two people"]
    for name, ours, theirs in (
        ("images", model.encode_image(image).features, exported.encode_image(image).features),
        (
            "captions",
            model.encode_text(model.tokenize(captions)).features,
            exported.encode_text(exported.tokenize(captions)).features,
        ),
    ):
        if not torch.allclose(ours, theirs, atol=1e-4):
            raise UserError(
                f"what was exported gives {name} other features than the trained model (by up to "
                f"{float((ours - theirs).abs().max()):.2g}); nothing was kept: report this with the model's name"
            )
