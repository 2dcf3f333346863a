"""Back-translation (Sennrich et al., 2016): into another language and back, by sampling, which gives more varied
results than beam search (Edunov et al., 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from fastmat.augment.huggingface import Sampling, load_pretrained, named_model, sampled
from fastmat.augment.offline import Request


class BackTranslation:
    """A caption translated there and back.

    there, back: folders or hub ids of two sequence-to-sequence models of transformers, such as
        Helsinki-NLP/opus-mt-en-de and Helsinki-NLP/opus-mt-de-en.
    top_p, temperature: of the nucleus sampling (this project's choice); temperature 0: the likeliest words.
    max_new_tokens: of a translation.
    device: the run's by default.
    """

    name = "back_translation"
    per: Literal["caption", "image"] = "caption"
    copies = None

    def __init__(
        self,
        *,
        there: str,
        back: str,
        top_p: float = 0.9,
        temperature: float = 1.0,
        max_new_tokens: int = 64,
        device: str = "cpu",
    ) -> None:
        self.sampling = Sampling(top_p=top_p, temperature=temperature, max_new_tokens=max_new_tokens)
        self.ways = [load_pretrained(("AutoModelForSeq2SeqLM", "AutoTokenizer"), path) for path in (there, back)]
        self.model = " ".join(
            named_model(path, model) for path, (model, _) in zip((there, back), self.ways, strict=True)
        )
        for model, _ in self.ways:
            model.to(torch.device(device)).eval()

    def __call__(self, requests: Sequence[Request]) -> list[str | None]:
        texts = [request.caption for request in requests]
        for model, tokenizer in self.ways:
            encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
            ids = sampled(model, inputs, self.sampling, seed=requests[0].seed)
            texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return list(texts)
