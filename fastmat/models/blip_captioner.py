"""BLIP's captioner (Li et al., ICML 2022): transformers' `BlipForConditionalGeneration`, behind the one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertTokenizerFast, BlipForConditionalGeneration

from fastmat.errors import UserError
from fastmat.models.blip_caption_checkpoint import WORDS, captioner_of
from fastmat.models.hf_clip import CLIP_MEAN, CLIP_STD
from fastmat.models.protocol import Encoded, ImageState, TextState, TextTokens, encodable, token_batch
from fastmat.models.tokenizers import WordPieceTokenizer, read_bert_tokenizer
from fastmat.models.weights import read_state
from fastmat.types import ImageTransform

IGNORED = -100


class BlipCaptioner(nn.Module):
    """Implements `fastmat.models.protocol.CaptioningModel`.

    prompt, beams, max_length, min_length: as of `load_blip_captioner`. A caption is read as [DEC] prompt words [SEP].
    """

    mean: Tensor
    std: Tensor
    logit_scale: Tensor

    def __init__(
        self,
        *,
        blip: BlipForConditionalGeneration,
        bert: BertTokenizerFast,
        prompt: str,
        beams: int,
        max_length: int,
        min_length: int,
    ) -> None:
        super().__init__()
        text = blip.config.text_config
        self.blip = blip
        self.bert = bert
        self.tokenizer = WordPieceTokenizer(bert)
        self.context_length: int = text.max_position_embeddings
        self.image_transform = ImageTransform(size=blip.config.vision_config.image_size)
        # A captioner compares nothing with an embedding.
        self.image_projection: nn.Module = nn.Identity()
        self.text_projection: nn.Module = nn.Identity()
        self.start = [text.bos_token_id, *bert.encode(prompt, add_special_tokens=False)]
        self.end: int = text.sep_token_id
        self.beams, self.max_length, self.min_length = beams, max_length, min_length
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1), persistent=False)
        self.register_buffer("logit_scale", torch.tensor(1.0), persistent=False)

    def tokenize(self, texts: Sequence[str], *, max_length: int | None = None, pad: bool = False) -> TextTokens:
        limit = self.context_length if max_length is None else min(max_length, self.context_length)
        room = limit - len(self.start) - 1
        words = (self.bert.encode(encodable(text), add_special_tokens=False)[:room] for text in texts)
        rows = [[*self.start, *ids, self.end] for ids in words]
        return token_batch(rows, pad_id=self.tokenizer.pad_id, length=limit if pad else None)

    def pixels(self, images: Tensor) -> Tensor:
        """As the vision encoder wants them."""
        size = self.image_transform.size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=True)
        return (images - self.mean) / self.std

    def encode_image(self, images: Tensor) -> ImageState:
        tokens = self.blip.vision_model(pixel_values=self.pixels(images)).last_hidden_state
        embeds = tokens[:, 0].float()
        return ImageState(tokens, embeds, F.normalize(embeds, dim=-1))

    def encode_text(self, tokens: TextTokens) -> TextState:
        raise UserError(
            "a captioner encodes no text that stands alone: attack its images (pgd or apgd with objective caption), or "
            "name surrogates that do"
        )

    def forward(self, images: Tensor | None, tokens: TextTokens | None) -> Encoded:
        image = None if images is None else self.encode_image(images)
        return Encoded(image, None if tokens is None else self.encode_text(tokens), self.logit_scale)

    def caption_losses(self, image: ImageState, tokens: TextTokens, owner: Tensor) -> Tensor:
        assert image.tokens is not None
        seen = image.tokens[owner]
        output: Any = self.blip.text_decoder(
            input_ids=tokens.ids,
            attention_mask=tokens.mask.long(),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device),
            use_cache=False,
        )
        told = tokens.ids.masked_fill(~tokens.mask, IGNORED)
        told[:, : len(self.start)] = IGNORED
        logits = output.logits[:, :-1].float().transpose(1, 2)
        losses = F.cross_entropy(logits, told[:, 1:], ignore_index=IGNORED, reduction="none")
        return losses.sum(1) / (told[:, 1:] != IGNORED).sum(1)

    @torch.no_grad()
    def generate(self, images: Tensor) -> list[str]:
        # transformers takes the last token of a prompt for its [SEP], and leaves it out.
        prompt = torch.tensor([[*self.start, self.end]] * len(images), device=images.device)
        ids: Tensor = self.blip.generate(
            pixel_values=self.pixels(images),
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            num_beams=self.beams,
            max_length=self.max_length,
            min_length=self.min_length,
            do_sample=False,
        )
        return [text.strip() for text in self.bert.batch_decode(ids[:, len(self.start) :], skip_special_tokens=True)]


def load_blip_captioner(
    path: str | None = None,
    *,
    checkpoint: Path | None = None,
    vocabulary: str = "google-bert/bert-base-uncased",
    image_size: int | None = None,
    image_heads: int = 12,
    text_heads: int = 12,
    prompt: str = "a picture of ",
    beams: int = 3,
    max_length: int = 20,
    min_length: int = 5,
) -> BlipCaptioner:
    """BLIP's captioner, from transformers' layout or from an official checkpoint.

    path: a folder or hub id with model and tokenizer (`Salesforce/blip-image-captioning-base`); layer norms are as its
        configuration says.
    checkpoint: or an official file (`model_base_caption_*.pth`), to which belong: vocabulary, BERT's `vocab.txt`, a
        folder with a tokenizer or a hub id; image_size, another resolution than the file's; image_heads, text_heads,
        attention heads, which no weight tells.
    prompt: what every caption begins with and its loss leaves out. beams: of the search. max_length, min_length: tokens
        with the prompt. All are those of the official `caption_coco.yaml` and `train_caption.py`.
    Raises UserError when a file is missing or another model's, naming the keys, and for lengths that the model has not.
    """
    if (path is None) == (checkpoint is None):
        raise UserError("name either path, a folder or hub id in transformers' layout, or checkpoint, an official file")
    if path is not None:
        blip = read_pretrained(path)
        bert = read_bert_tokenizer(path, size=blip.config.text_config.vocab_size, added=2)
    else:
        assert checkpoint is not None
        state = read_state(checkpoint)
        pieces = state[WORDS].shape[0] if WORDS in state else 0
        if not pieces:
            raise UserError(f"{checkpoint} is no captioner of BLIP: '{WORDS}' is missing")
        bert = read_bert_tokenizer(vocabulary, size=pieces, added=2)
        blip = captioner_of(
            state,
            bert,
            image_size=image_size,
            image_heads=image_heads,
            text_heads=text_heads,
            source=str(checkpoint),
        )
    longest = blip.config.text_config.max_position_embeddings
    if beams < 1 or not 0 <= min_length <= max_length <= longest:
        raise UserError(
            f"beams must be at least 1 and 0 <= min_length <= max_length <= {longest}, got {beams}, {min_length} and "
            f"{max_length}"
        )
    captioner = BlipCaptioner(
        blip=blip, bert=bert, prompt=prompt, beams=beams, max_length=max_length, min_length=min_length
    )
    if len(captioner.start) >= max_length:
        raise UserError(f"max_length must exceed the {len(captioner.start)} tokens of the prompt, got {max_length}")
    return captioner.eval()


def read_pretrained(path: str) -> BlipForConditionalGeneration:
    """Raises UserError where there is no captioner, or one without all its weights."""
    try:
        blip, info = BlipForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    except Exception as error:  # transformers, safetensors and the hub each raise their own
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"path: no BLIP captioner in {path!r} ({line}); give a folder or a hub id") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"path: {path} is no BLIP captioner: {len(missing)} weights are missing, such as {missing[0]}")
    return blip
