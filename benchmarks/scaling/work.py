"""What one step of a method computes: passes through each tower, and their FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastmat.benchmarks.scaling.shapes import Model, Tower

METHODS = ("finetune", "fare", "tecoa_itr", "mat")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """words: attackable ones of a caption. candidates: texts tried in its place. tokens: of a text, packed, in the
    attack; longest: of a batch, to which the outer forward pads. Means over Flickr30k's test captions."""

    words: float = 7.0
    candidates: float = 11.0
    tokens: int = 16
    longest: int = 36


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Through one tower, per pair: `forward` without a graph, in `calls` calls a step; `attacked`: forward and backward
    to the image with frozen weights; `trained`: forward and backward to the weights."""

    forward: float = 0.0
    calls: int = 0
    attacked: int = 0
    trained: int = 0


def passes_of(method: str, model: Model, texts: Texts) -> dict[str, Passes]:
    """By tower: "image", "text", "fusion", and "momentum" (of both towers), "teacher" (a frozen image tower)."""
    if method == "fare":  # PGD-10 on the image tower alone
        return {"image": Passes(attacked=10, trained=1), "teacher": Passes(forward=1, calls=1)}
    found = {"image": Passes(trained=1), "text": Passes(trained=1)}
    if method == "tecoa_itr":  # PGD-10 against the clean captions
        found["image"] = Passes(attacked=10, trained=1)
        found["text"] = Passes(forward=1, calls=1, trained=1)
    if method == "mat":
        # The clean image guides; the caption, every masked form, every candidate and the chosen text are encoded.
        found["image"] = Passes(forward=1, calls=1, attacked=2, trained=1)
        found["text"] = Passes(forward=2 + texts.words + texts.candidates, calls=3, trained=1)
    if model.fusion is not None:  # ITM: the pair, one negative image and one negative text
        found["fusion"] = Passes(trained=3)
    if model.queue:
        found["momentum"] = Passes(forward=1, calls=1)
    return found


def trained_parameters(method: str, model: Model) -> int:
    return model.image.parameters if method == "fare" else model.parameters


def outer_text(model: Model, texts: Texts) -> Tower:
    """CLIP's text tower at the length of a batch; ALBEF and BLIP pad to theirs."""
    return replace(model.text, tokens=min(model.text.tokens, texts.longest))


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Of one GPU. inner: before the outer update; backward: the outer backward, behind which gradients travel."""

    inner: float
    forward: float
    backward: float
    contrast: float

    @property
    def total(self) -> float:
        return self.inner + self.forward + self.backward + self.contrast


def step_flops(
    model: Model,
    method: str,
    texts: Texts,
    *,
    batch: int,
    gpus: int,
    checkpointing: bool = False,
    cached: bool = False,
) -> StepFlops:
    """batch: pairs of one GPU. checkpointing, cached (gradients by micro-batches): one outer forward more each."""
    passes = passes_of(method, model, texts)
    text = outer_text(model, texts)
    inner = forward = backward = 0.0
    for name, tower in (("image", model.image), ("text", text), ("fusion", model.fusion)):
        if tower is None or name not in passes:
            continue
        own, flops = passes[name], tower.flops
        attacked_text = replace(tower, tokens=min(tower.tokens, texts.tokens)).flops if name == "text" else flops
        inner += own.forward * attacked_text.forward + own.attacked * (flops.forward + flops.input_backward)
        repeated = own.trained - 1 if name == "fusion" else 0  # keys and values of an image once, for all its texts
        forward += own.trained * flops.forward - repeated * tower.context_flops
        backward += own.trained * flops.full_backward - repeated * 2 * tower.context_flops
    if "teacher" in passes:
        inner += model.image.flops.forward
    if "momentum" in passes:
        inner += model.image.flops.forward + text.flops.forward
    contrast = 0.0
    if method != "fare":
        # Own rows against all columns, images and texts: a product forward, three backward (recomputed, two gradients).
        contrast = 8 * 2.0 * batch * (batch * gpus + model.queue) * model.embed
    backward += forward * (checkpointing + cached)
    return StepFlops(inner=batch * inner, forward=batch * forward, backward=batch * backward, contrast=contrast)
