"""Image captioning: new captions from the picture alone, cross-modal where the others stay within the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from fastmat.augment.huggingface import Sampling, load_pretrained, named_model, sampled
from fastmat.augment.offline import Request


class Captioning:
    """What a captioner says of an image, by nucleus sampling, which BLIP found better for training than beam search
    (Li et al., ICML 2022, section 6.1); top_p is BLIP's.

    model: folder or hub id of a captioner of transformers that needs no prompt, such as
        Salesforce/blip-image-captioning-base.
    top_p, temperature: of the sampling; temperature 0: the likeliest words.
    max_new_tokens: of a caption.
    device: the run's by default.
    """

    name = "caption"
    per: Literal["caption", "image"] = "image"
    copies = None

    def __init__(
        self,
        *,
        model: str,
        top_p: float = 0.9,
        temperature: float = 1.0,
        max_new_tokens: int = 30,
        device: str = "cpu",
    ) -> None:
        self.sampling = Sampling(top_p=top_p, temperature=temperature, max_new_tokens=max_new_tokens)
        self.captioner, self.processor = load_pretrained(("AutoModelForImageTextToText", "AutoProcessor"), model)
        self.model = named_model(model, self.captioner)
        self.captioner.to(torch.device(device)).eval()

    def __call__(self, requests: Sequence[Request]) -> list[str | None]:
        encoded = self.processor(images=[request.load() for request in requests], return_tensors="pt")
        ids = sampled(self.captioner, {"pixel_values": encoded["pixel_values"]}, self.sampling, seed=requests[0].seed)
        return [text.strip() or None for text in self.processor.batch_decode(ids, skip_special_tokens=True)]
