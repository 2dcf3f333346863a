"""First-order screening: which substitutes are worth encoding, from one gradient per caption (HotFlip, ACL 2018).

An approximation: the best substitute may be screened out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastmat.errors import UserError
from fastmat.models.protocol import TextState, VisionLanguageModel, has_embeddings, token_batch
from fastmat.text.spelling import Ids, shared


def estimates(
    model: VisionLanguageModel,
    texts: Sequence[Ids],
    variants: Sequence[Sequence[Ids]],
    value: Callable[[TextState], Tensor],
) -> list[list[float]]:
    """By how much `value(state) -> [T]` rises from each text to each of its variants, to first order.

    The gradient with respect to the embeddings of the tokens that differ, averaged over them, times the difference of
    the sums of embeddings. Raises UserError for a model that hides its embeddings.
    """
    embedding = model.token_embedding if has_embeddings(model) else None
    if embedding is None:
        raise UserError("screen needs a model whose token embeddings are known: leave screen off")
    device = embedding.weight.device
    gradient = embedding_gradient(model, embedding, texts, value)
    before = torch.cat((gradient.new_zeros(len(texts), 1, gradient.shape[2]), gradient.cumsum(1)), 1)
    owner, first, last, new, old = [], [], [], [], []
    for t, (text, of) in enumerate(zip(texts, variants, strict=True)):
        for variant in of:
            start = shared(text, variant)
            end = min(shared(text[::-1], variant[::-1]), len(text) - start, len(variant) - start)
            owner.append(t)
            first.append(min(start, len(text) - 1))
            last.append(max(len(text) - end, first[-1] + 1))
            new.append(variant[start : len(variant) - end])
            old.append(text[start : len(text) - end])
    if not owner:
        return [[] for _ in texts]
    rows, begin, stop = (torch.tensor(of, device=device) for of in (owner, first, last))
    slope = (before[rows, stop] - before[rows, begin]) / (stop - begin)[:, None]
    rise = ((bag(embedding, new) - bag(embedding, old)) * slope).sum(1).tolist()
    found, done = [], 0
    for of in variants:
        found.append(rise[done : done + len(of)])
        done += len(of)
    return found


@torch.enable_grad()
def embedding_gradient(
    model: VisionLanguageModel, embedding: nn.Embedding, texts: Sequence[Ids], value: Callable[[TextState], Tensor]
) -> Tensor:
    """[T, L, W]: of the sum of `value`, with respect to the embedded tokens."""
    embedded: list[Tensor] = []

    def remember(module: nn.Module, ids: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_(True))
        return embedded[-1]

    length = model.context_length if model.tokenizer.pad_to_context else None
    hook = embedding.register_forward_hook(remember)
    try:
        tokens = token_batch(texts, pad_id=model.tokenizer.pad_id, length=length).to(embedding.weight.device)
        total = value(model.encode_text(tokens)).sum()
    finally:
        hook.remove()
    return torch.autograd.grad(total, embedded)[0]


def bag(embedding: nn.Embedding, rows: Sequence[Ids]) -> Tensor:
    """[N, W]: the sum of embeddings of each row; zero for an empty one."""
    device = embedding.weight.device
    ids = torch.tensor([i for row in rows for i in row], dtype=torch.int64, device=device)
    owner = torch.tensor([n for n, row in enumerate(rows) for _ in row], dtype=torch.int64, device=device)
    weight = embedding.weight.detach()
    return weight.new_zeros(len(rows), weight.shape[1]).index_add_(0, owner, weight[ids])
