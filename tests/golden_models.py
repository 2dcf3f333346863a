"""The models behind the recordings, behind fastmat's protocol."""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import golden
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizerFast,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from fastmat.models.albef import Albef, load_albef
from fastmat.models.blip import Blip, load_blip
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.hf_clip import CLIP_MEAN, CLIP_STD, VisionTower, take_apart
from fastmat.models.protocol import ImageState, TextState, TextTokens, token_batch
from fastmat.models.tokenizers import ClipTokenizer, HashTokenizer, WordPieceTokenizer
from fastmat.text.mlm import MaskedLanguageModel
from fastmat.types import Batch, ImageTransform


@cache
def golden_mlm() -> MaskedLanguageModel:
    """The recorded masked language model with BERT's vocabulary."""
    return MaskedLanguageModel(model=_load(BertForMaskedLM, BertConfig, "mlm"), tokenizer=bert_tokenizer(), name="mlm")


def golden_clip() -> DualEncoder:
    """The recorded CLIPModel: 64 px, context 77, OpenAI's byte pairs."""
    clip = _load(CLIPModel, CLIPConfig, "clip_model")
    tokenizer = ClipTokenizer(SimpleTokenizer(context_length=77))
    return take_apart(clip, tokenizer, ImageTransform(size=64)).eval()


def golden_bert(*, append_sep: bool = False) -> "BertTextEncoder":
    """The recorded ALBEF-like text encoder; `append_sep` is the recordings' tokenisation `sep`."""
    config, tensors = golden("text_encoder_bert")
    bert = BertModel(BertConfig(**config["config"]), add_pooling_layer=False)
    projection = nn.Linear(32, 32)
    model = BertTextEncoder(bert, projection, append_sep=append_sep).eval()
    state = {key.replace("text_proj.", "text_projection."): value for key, value in tensors.items()}
    model.load_state_dict(state)
    return model


class BertTextEncoder(nn.Module):
    """A text tower alone: tokens are BERT's last hidden state, embeds the projection of its first position."""

    def __init__(
        self, bert: BertModel, projection: nn.Linear, *, append_sep: bool, tokenizer: BertTokenizerFast | None = None
    ) -> None:
        super().__init__()
        self.bert = bert
        self.text_projection = projection
        self.tokenizer = WordPieceTokenizer(tokenizer or bert_tokenizer(), append_sep=append_sep)
        self.context_length = 96

    @property
    def logit_scale(self) -> Tensor:
        return self.text_projection.weight.new_ones(())

    def tokenize(self, texts: Sequence[str], *, max_length: int | None = None, pad: bool = False) -> TextTokens:
        limit = max_length or self.context_length
        rows = [self.tokenizer(text, limit) for text in texts]
        return token_batch(rows, pad_id=self.tokenizer.pad_id, length=limit if pad else None)

    def encode_text(self, tokens: TextTokens) -> TextState:
        hidden = self.bert(input_ids=tokens.ids, attention_mask=tokens.mask.long()).last_hidden_state
        embeds = self.text_projection(hidden[:, 0])
        return TextState(tokens.ids, tokens.mask, hidden, embeds, F.normalize(embeds, dim=-1))

    def encode_image(self, images: Tensor) -> ImageState:
        raise NotImplementedError("the recordings have no vision tower beside this text encoder")


@cache
def bert_tokenizer() -> BertTokenizerFast:
    """bert-base-uncased's vocabulary, which lies beside the recordings."""
    folder = os.environ.get("FASTMAT_GOLDEN")
    if not folder:
        pytest.skip("FASTMAT_GOLDEN is not set: recordings of the published implementations are not at hand")
    return BertTokenizerFast(vocab=str(Path(folder).parent / "data/vocab/bert-base-uncased-vocab.txt"))


def _load(cls: type, config: type, name: str) -> nn.Module:
    recorded, tensors = golden(name)
    model = cls(config(**recorded["config"]))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert not unexpected and all(key in tied or key.endswith("position_ids") for key in missing), (missing, unexpected)
    return model.eval()


def golden_classifier() -> tuple[DualEncoder, nn.Linear, Batch, Tensor]:
    """The recorded image classifier: encoder, head, its images and their labels."""
    config, tensors = golden("pgd_model")
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**config["config"]))
    state = {k.removeprefix("vision."): v for k, v in tensors.items() if k.startswith("vision.")}
    missing = vision.load_state_dict(state, strict=False).missing_keys
    assert all("position_ids" in key for key in missing)
    head = nn.Linear(32, 10)
    head.load_state_dict({k: tensors[f"head.{k}"] for k in ("weight", "bias")})
    model = DualEncoder(
        image_tower=VisionTower(vision.vision_model),
        image_projection=vision.visual_projection,
        text_tower=nn.Identity(),
        text_projection=nn.Identity(),
        log_logit_scale=nn.Parameter(torch.tensor(0.0)),
        tokenizer=HashTokenizer(4),
        context_length=4,
        image_transform=ImageTransform(size=32),
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )
    images = tensors["images_u8"] / 255
    n = len(images)
    batch = Batch(
        images=images,
        texts=("",) * n,
        txt2img=torch.arange(n),
        index=torch.arange(n),
        group=torch.arange(n),
    )
    torch.testing.assert_close(head(model.eval().encode_image(images).embeds), tensors["clean_logits"])
    return model, head, batch, tensors["labels"]


def golden_albef(folder: Path, name: str = "albef_weights", **settings: object) -> Albef:
    """A recorded ALBEF, from its file in the official layout. folder: for a vocabulary of the model's size."""
    vocabulary = cut_vocabulary(folder, golden(name)[0]["bert_config"]["vocab_size"])
    file = Path(os.environ["FASTMAT_GOLDEN"]) / f"{name}.pth"
    file = file if file.exists() else file.with_suffix(".safetensors")
    return load_albef(file, vocabulary=vocabulary, image_heads=4, text_heads=4, **settings).eval()


def golden_blip(folder: Path, **settings: object) -> Blip:
    """The recorded BLIP, from its file in the official layout. folder: for a vocabulary of the model's size."""
    vocabulary = cut_vocabulary(folder, golden("blip_weights")[0]["med_config"]["vocab_size"] - 2)
    file = Path(os.environ["FASTMAT_GOLDEN"]) / "blip_weights.pth"
    return load_blip(file, vocabulary=vocabulary, image_heads=4, text_heads=4, **settings).eval()


def cut_vocabulary(folder: Path, size: int) -> str:
    """The first pieces of BERT's vocabulary, in a file."""
    bert_tokenizer()  # skips without the recordings
    whole = Path(os.environ["FASTMAT_GOLDEN"]).parent / "data/vocab/bert-base-uncased-vocab.txt"
    file = folder / "vocab.txt"
    file.write_text("\n".join(whole.read_text().splitlines()[:size]) + "\n")
    return str(file)
