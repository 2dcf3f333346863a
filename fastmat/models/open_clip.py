"""Any open_clip model: a name with a pretrained tag or weight file, or a local folder with its configuration."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import (
    ResidualAttentionBlock,
    TextTransformer,
    Transformer,
    VisionTransformer,
    text_global_pool,
)
from torch import Tensor, nn

from fastmat.errors import UserError, nearest
from fastmat.models.causal import CausalBlock, CausalTower
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.protocol import Tokenizer
from fastmat.models.tokenizers import ClipTokenizer, HubTokenizer
from fastmat.models.weights import load_weights
from fastmat.types import ImageTransform


class ViTTower(nn.Module):
    """open_clip's VisionTransformer without its projection; tokens are the patches."""

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        visual.proj = None
        visual.output_tokens = True
        _sequence_first(visual.transformer)
        self.visual = visual

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.visual(images)


class TimmTower(nn.Module):
    """A timm trunk and head without the final linear layer; tokens are the cells of the last feature map."""

    def __init__(self, visual: TimmModel) -> None:
        super().__init__()
        visual.head.proj = nn.Identity()
        self.visual = visual

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        grid = self.visual.trunk.forward_features(images)
        pooled = self.visual.head(self.visual.trunk.forward_head(grid))
        if grid.dim() == 3:
            return pooled, grid
        channels_last = getattr(self.visual.trunk, "output_fmt", "NCHW") == "NHWC"  # Swin and its kin
        return pooled, grid.flatten(1, 2) if channels_last else grid.flatten(2).transpose(1, 2)


class WholeImageTower(nn.Module):
    """A vision tower whose projection cannot be taken off (attention-pooled ResNets); no tokens."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.visual(images), None


class TextTower(nn.Module):
    """open_clip's TextTransformer without its projection, run on rows only as long as their longest caption."""

    def __init__(self, text: TextTransformer) -> None:
        super().__init__()
        text.text_projection = None
        _sequence_first(text.transformer)
        self.text = text

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        text, length = self.text, ids.shape[1]
        x = text.token_embedding(ids) + text.positional_embedding[:length]
        causal = None if text.attn_mask is None else text.attn_mask[:length, :length].to(x)
        tokens = text.ln_final(text.transformer(x, attn_mask=causal))
        return text_global_pool(tokens, ids, text.pool_type, eos_token_id=getattr(text, "eos_id", None)), tokens

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.text.token_embedding

    def causal(self) -> CausalTower | None:
        """The tower block by block; None where a token sees what comes after it, or a block is not the plain one."""
        text = self.text
        blocks = list(text.transformer.resblocks)
        plain = all(type(b) is ResidualAttentionBlock and type(b.attn) is nn.MultiheadAttention for b in blocks)
        if text.attn_mask is None or text.pool_type not in ("argmax", "eos") or not plain:
            return None
        return CausalTower(
            embed=lambda ids, positions: text.token_embedding(ids) + text.positional_embedding[positions],
            blocks=[_block(block) for block in blocks],
            norm=text.ln_final,
        )


def _sequence_first(transformer: Transformer) -> None:
    """Attention on [L, N, W]. Batch first, PyTorch copies a frozen weight once per row of the batch."""
    if all(type(block) is ResidualAttentionBlock for block in transformer.resblocks):
        transformer.batch_first = False
        for block in transformer.resblocks:
            block.attn.batch_first = False


def _block(block: ResidualAttentionBlock) -> CausalBlock:
    attention = block.attn
    return CausalBlock(
        heads=attention.num_heads,
        norm_1=block.ln_1,
        project=lambda x: F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1),
        merge=lambda x: block.ls_1(attention.out_proj(x)),
        norm_2=block.ln_2,
        feed_forward=lambda x: block.ls_2(block.mlp(x)),
    )


class WholeTextTower(nn.Module):
    """A text tower of another library inside open_clip; it keeps its projection and gives no tokens."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.text(ids), None


def load_open_clip(architecture: str, *, pretrained: str | None = None, image_size: int | None = None) -> DualEncoder:
    """A model of the open_clip library.

    architecture: a name such as "ViT-B-16", or a folder with `open_clip_config.json` and weights.
    pretrained: a tag of the library (downloaded by it), a weight file, or None for random weights (a folder brings
        its own). image_size: another resolution; position embeddings are interpolated.
    Raises UserError for an unknown name, a folder without its files, weights that do not fit.
    """
    clip = make_open_clip(architecture, pretrained=pretrained, image_size=image_size)
    return take_apart(clip, open_clip.get_tokenizer(_library_name(architecture)))


def make_open_clip(architecture: str, *, pretrained: str | None, image_size: int | None) -> CustomTextCLIP:
    """The same as the library has it, in fp32, the parts of its text tower under `text.`."""
    folder = Path(architecture)
    local = folder.is_dir()
    if local:
        if not (folder / "open_clip_config.json").is_file():
            raise UserError(f"{folder} has no open_clip_config.json; give a folder saved in open_clip's layout")
    elif architecture not in open_clip.list_models() and not architecture.startswith("hf-hub:"):
        raise UserError(f"open_clip has no model {architecture!r}" + nearest(architecture, open_clip.list_models()))
    file = _weight_file(folder) if local else Path(pretrained) if pretrained and Path(pretrained).is_file() else None
    tag = pretrained if pretrained and file is None else None
    if tag and tag not in open_clip.list_pretrained_tags_by_model(architecture):
        known = open_clip.list_pretrained_tags_by_model(architecture)
        raise UserError(f"{architecture} has no pretrained tag or weight file {tag!r}" + nearest(tag, known))
    logging.disable(logging.WARNING)  # open_clip warns on the root logger that weights come later
    try:
        clip = open_clip.create_model(
            _library_name(architecture),
            pretrained=tag,
            load_weights=tag is not None or architecture.startswith("hf-hub:"),
            pretrained_text=False,
            force_custom_text=True,
            force_image_size=image_size,
        )
    except Exception as error:  # the hub, the configuration and the weights each raise their own
        raise UserError(f"open_clip could not make {architecture!r} ({_first_line(error)})") from error
    finally:
        logging.disable(logging.NOTSET)
    if not isinstance(clip, CustomTextCLIP):
        raise UserError(f"{architecture!r} is a {type(clip).__name__}; only dual encoders are supported")
    if file is not None:
        load_weights(clip, file, rename=_custom_text_keys)
    return clip.float()


def _library_name(architecture: str) -> str:
    """A folder has a schema of its own there."""
    return f"local-dir:{Path(architecture)}" if Path(architecture).is_dir() else architecture


def take_apart(clip: CustomTextCLIP, tokenizer: object) -> DualEncoder:
    """The pieces of an open_clip model as a DualEncoder; `clip` is used up."""
    visual, text = clip.visual, clip.text
    image_tower: nn.Module
    text_tower: nn.Module
    image_projection: nn.Module = nn.Identity()
    text_projection: nn.Module = nn.Identity()
    if isinstance(visual, VisionTransformer) and visual.proj is not None:
        image_projection = _linear(visual.proj)
        image_tower = ViTTower(visual)
    elif isinstance(visual, TimmModel) and isinstance(getattr(visual.head, "proj", None), nn.Linear):
        image_projection = visual.head.proj
        image_tower = TimmTower(visual)
    else:
        image_tower = WholeImageTower(visual)
    plain_text = isinstance(text, TextTransformer) and text.cls_emb is None and not text.use_pad_mask
    if plain_text:
        if text.text_projection is not None:
            text_projection = _linear(text.text_projection)
        text_tower = TextTower(text)
    else:
        text_tower = WholeTextTower(text)
    wrapped: Tokenizer
    if isinstance(tokenizer, SimpleTokenizer):
        wrapped = ClipTokenizer(tokenizer)
    else:
        wrapped = HubTokenizer(tokenizer, context_length=clip.context_length)
    # Rows may be cut to the longest caption only where nothing looks past a caption's end.
    wrapped.pad_to_context = not (plain_text and text.attn_mask is not None and text.pool_type in ("argmax", "eos"))
    config = visual.preprocess_cfg
    size = config["size"][0] if isinstance(config["size"], tuple | list) else config["size"]
    return DualEncoder(
        image_tower=image_tower,
        image_projection=image_projection,
        text_tower=text_tower,
        text_projection=text_projection,
        log_logit_scale=nn.Parameter(clip.logit_scale.detach().reshape(())),
        tokenizer=wrapped,
        context_length=clip.context_length,
        image_transform=ImageTransform(
            size=size,
            mode="squash" if config["resize_mode"] == "squash" else "crop",
            interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        ),
        mean=config["mean"],
        std=config["std"],
    )


def _linear(projection: nn.Linear | nn.Parameter) -> nn.Linear:
    """open_clip keeps some projections as a [in, out] matrix."""
    if isinstance(projection, nn.Linear):
        return projection
    width, embed = projection.shape
    linear = nn.Linear(width, embed, bias=False)
    linear.weight = nn.Parameter(projection.detach().T.contiguous())
    return linear


def _weight_file(folder: Path) -> Path:
    for name in ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no weights (open_clip_model.safetensors or open_clip_pytorch_model.bin)")


def _custom_text_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original CLIP layout keeps the text tower's parts at the top; the newer one under `text.`."""
    top = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
    return {f"text.{k}" if k.startswith(top) else k: torch.as_tensor(v) for k, v in state.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
