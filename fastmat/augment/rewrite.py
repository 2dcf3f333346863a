"""Rewriting by a language model, which the study behind MAT+ tried with Llama (arXiv 2405.18770); the prompt is this
project's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from fastmat.augment.huggingface import Sampling, load_pretrained, named_model, sampled
from fastmat.augment.offline import Request
from fastmat.errors import UserError

PROMPT = (
    "Say the following image caption in other words. Keep everything that it says about the picture, add nothing, and "
    "answer with the new caption alone.\nCaption: {caption}\nIn other words:"
)


class Rewrite:
    """A caption in a language model's own words; of its answer the first line counts.

    model: folder or hub id of a causal language model of transformers. One with a chat template is asked as a user
        asks.
    prompt: with {caption} where the caption shall stand.
    top_p, temperature: of the nucleus sampling (this project's choice); temperature 0: the likeliest words.
    max_new_tokens: of an answer.
    device: the run's by default.
    """

    name = "rewrite"
    per: Literal["caption", "image"] = "caption"
    copies = None

    def __init__(
        self,
        *,
        model: str,
        prompt: str = PROMPT,
        top_p: float = 0.9,
        temperature: float = 0.8,
        max_new_tokens: int = 48,
        device: str = "cpu",
    ) -> None:
        self.sampling = Sampling(top_p=top_p, temperature=temperature, max_new_tokens=max_new_tokens)
        if "{caption}" not in prompt:
            raise UserError(f"prompt must hold {{caption}} where the caption shall stand, got {prompt!r}")
        self.prompt = prompt
        self.lm, self.tokenizer = load_pretrained(("AutoModelForCausalLM", "AutoTokenizer"), model)
        self.model = named_model(model, self.lm)
        self.lm.to(torch.device(device)).eval()
        self.tokenizer.padding_side = "left"  # answers begin where prompts end
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, requests: Sequence[Request]) -> list[str | None]:
        asked = [self.asked(request.caption) for request in requests]
        special = self.tokenizer.chat_template is None  # a template writes its own
        encoded = self.tokenizer(asked, padding=True, add_special_tokens=special, return_tensors="pt")
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        ids = sampled(self.lm, inputs, self.sampling, seed=requests[0].seed)
        answers = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [first_line(answer) for answer in answers]

    def asked(self, caption: str) -> str:
        text = self.prompt.replace("{caption}", caption)
        if self.tokenizer.chat_template is None:
            return text
        turn = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def first_line(answer: str) -> str | None:
    """The first line that says something, without quotation marks around it.

    >>> first_line('\\n "A dog runs."\\nI kept the dog.'), first_line(" ")
    ('A dog runs.', None)
    """
    lines = [line.strip().strip('"\u201c\u201d').strip() for line in answer.splitlines()]
    return next(filter(None, lines), None)
