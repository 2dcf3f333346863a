"""What every attack of a run works on: one model, one masked language model, one batch, each also as files on disk.

The files are what a process of its own (peak memory, a checkout of the originals) reads back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from fastmat.data.digits import digits_set
from fastmat.data.loader import evaluation_batches
from fastmat.data.retrieval import RetrievalSet, read_retrieval_set
from fastmat.errors import UserError, nearest
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.open_clip import load_open_clip
from fastmat.text.mlm import MaskedLanguageModel
from fastmat.types import Batch

CAPTIONS = 5  # per image at most, as in Flickr30k
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the command line chose. model: an open_clip architecture (random weights) or folder; mlm: a folder;
    data: a JSON list with its pictures beside it; None: built in, small and random. images: how many."""

    model: str | None
    mlm: str | None
    data: str | None
    images: int
    short: bool


@dataclass(frozen=True, kw_only=True)
class Setting:
    """batch: all images with up to 5 captions each, on the device. others: captions of the rest of the data.

    model, lowered: in fp32 and in bf16, frozen.
    unfrozen, unfrozen_bert: as the originals hold them, in eval mode with every weight asking for a gradient.
    model_folder, mlm_folder: the same as files. candidates: folder of what the language model proposes.
    names: what stands in a row.
    """

    model: DualEncoder
    lowered: DualEncoder
    unfrozen: DualEncoder
    mlm: MaskedLanguageModel
    unfrozen_bert: BertForMaskedLM
    tokenizer: BertTokenizerFast
    batch: Batch
    others: tuple[str, ...]
    model_folder: Path
    mlm_folder: Path
    candidates: Path
    names: Mapping[str, int | float | str | bool]

    @property
    def device(self) -> torch.device:
        return self.batch.images.device


class Lowered(nn.Module):
    """An image tower in another dtype; images stay fp32 outside."""

    def __init__(self, tower: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.tower = tower
        self.dtype = dtype

    def forward(self, images: Tensor) -> Any:
        return self.tower(images.to(self.dtype))


def lower(model: DualEncoder) -> DualEncoder:
    """A copy whose encoders compute in bf16: weights cast once, embeddings and features fp32."""
    copy = deepcopy(model)
    for part in (copy.image_tower, copy.image_projection, copy.text_tower, copy.text_projection):
        part.bfloat16()
    copy.image_tower = Lowered(copy.image_tower, torch.bfloat16)
    return copy


def prepare(choice: Choice, folder: Path, device: torch.device) -> Setting:
    """Everything in place; `folder` receives what was made here. Raises UserError for what cannot be loaded."""
    whole = _data(choice)
    dataset = whole.take(choice.images)
    model_folder = _model_folder(choice, folder / "model")
    mlm_folder = Path(choice.mlm) if choice.mlm else _small_mlm(dataset, folder / "mlm", short=choice.short)
    model = load_open_clip(str(model_folder)).to(device).eval().requires_grad_(False)
    mlm = MaskedLanguageModel.load(mlm_folder).to(device)
    batch = _batch(dataset, model)
    return Setting(
        model=model,
        lowered=lower(model),
        unfrozen=deepcopy(model).requires_grad_(True),
        mlm=mlm,
        unfrozen_bert=deepcopy(mlm.model).requires_grad_(True),
        tokenizer=BertTokenizerFast.from_pretrained(str(mlm_folder)),
        batch=batch.to(device),
        others=tuple(caption for captions in whole.captions[choice.images :] for caption in captions[:CAPTIONS]),
        model_folder=model_folder,
        mlm_folder=mlm_folder,
        candidates=folder / "candidates",
        names={
            "model": Path(choice.model).name if choice.model else "built-in",
            "mlm": Path(choice.mlm).name if choice.mlm else "built-in",
            "data": dataset.name,
            "images": len(batch),
            "captions": len(batch.texts),
            "side": model.image_transform.size,
        },
    )


def write_batch(batch: Batch, folder: Path) -> None:
    """`batch.safetensors` (images, txt2img) and `texts.json`."""
    save_file({"images": batch.images.cpu(), "txt2img": batch.txt2img.cpu()}, str(folder / "batch.safetensors"))
    (folder / "texts.json").write_text(json.dumps(batch.texts), encoding="utf-8")


def first_captions(batch: Batch) -> Batch:
    """One caption per image, the first."""
    first = [batch.txt2img.tolist().index(i) for i in range(len(batch))]
    return Batch(
        images=batch.images,
        texts=tuple(batch.texts[t] for t in first),
        txt2img=torch.arange(len(batch), device=batch.images.device),
        index=batch.index,
        group=batch.group,
    )


def _data(choice: Choice) -> RetrievalSet:
    if choice.data is None:
        return digits_set("test")
    file = Path(choice.data)
    return read_retrieval_set(file, file.parent, name=file.parent.name, split=file.stem)


def _batch(dataset: RetrievalSet, model: DualEncoder) -> Batch:
    """The whole set in one batch."""
    (batch,) = evaluation_batches(dataset, model.image_transform, batch_size=dataset.n_images)
    owners = batch.txt2img.tolist()
    keep = [t for t, image in enumerate(owners) if owners[:t].count(image) < CAPTIONS]
    return Batch(
        images=batch.images,
        texts=tuple(batch.texts[t] for t in keep),
        txt2img=batch.txt2img[keep],
        index=batch.index,
        group=batch.group,
    )


def _model_folder(choice: Choice, folder: Path) -> Path:
    """An open_clip folder: the one that was named, or random weights written to `folder`."""
    if choice.model is not None and Path(choice.model).is_dir():
        return Path(choice.model)
    if choice.model is None:
        config = _small_config(short=choice.short)
    elif choice.model in open_clip.list_models():
        config = open_clip.get_model_config(choice.model)
    else:
        raise UserError(
            f"--model {choice.model} is neither a folder nor a model of open_clip"
            + nearest(choice.model, open_clip.list_models())
        )
    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
        clip = whole(**{key: value for key, value in config.items() if key != "custom_text"})
    side = config["vision_cfg"]["image_size"]
    preprocess = {"size": side, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "resize_mode": "squash"}
    preprocess["interpolation"] = "bicubic"
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    weights = {key: value.contiguous() for key, value in clip.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def _small_config(*, short: bool) -> dict[str, Any]:
    """CLIP with two (short) or four layers a tower."""
    layers, width, side = (1, 32, 32) if short else (4, 128, 64)
    return {
        "embed_dim": width,
        "vision_cfg": {"image_size": side, "patch_size": 8, "width": width, "layers": layers, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": width, "heads": width // 32, "layers": layers},
    }


def _small_mlm(dataset: RetrievalSet, folder: Path, *, short: bool) -> Path:
    """A random masked language model whose vocabulary is the captions' words and the letters."""
    words = sorted({word for own in dataset.captions for text in own for word in text.lower().split(" ")})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = dict.fromkeys([*SPECIAL, *words, *".,'-", *letters, *(f"##{letter}" for letter in letters)])
    tokenizer = BertTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)})
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32 if short else 128,
        num_hidden_layers=1 if short else 4,
        num_attention_heads=2,
        intermediate_size=64 if short else 512,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
