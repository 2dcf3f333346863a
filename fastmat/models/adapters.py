"""Low-rank adapters (LoRA, Hu et al., ICLR 2022) by the `peft` library: train few weights, export a plain model.

`add_adapters` changes a model in place: the modules that `targets` names get adapters, everything else is frozen. Which
of them train is up to the defence's `trains`: adapters of a tower that it leaves out stay what they are, zero.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastmat.errors import UserError, nearest
from fastmat.models.protocol import VisionLanguageModel
from fastmat.models.weights import load_weights, save_weights

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

ADAPTABLE = (nn.Linear, nn.Conv2d, nn.Embedding, nn.MultiheadAttention)
Model = TypeVar("Model", bound=VisionLanguageModel)


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """targets: modules by the ends of their names, such as q_proj and v_proj (hf_clip), or attn and c_fc (open_clip).

    rank: of the update B A. alpha: it is scaled by alpha / rank. dropout: of its input, while training.
    """

    targets: tuple[str, ...]
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.targets or not all(self.targets):
            raise UserError("targets must name at least one module, such as q_proj")
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, got {self.rank}")
        if self.alpha < 1:
            raise UserError(f"alpha must be at least 1, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout}")


def add_adapters(model: VisionLanguageModel, settings: AdapterSettings, *, seed: int = 0) -> None:
    """Put adapters into `model`, in place; it computes what it did before, until they train.

    seed: of the first weights of A (B begins at zero); the global random state is left as it was.
    Raises UserError without peft, for names that no module has or peft cannot adapt, and for modules whose weights
    another module reads past them, so that an adapter would not be heard.
    """
    assert isinstance(model, nn.Module)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("adapters need the peft library: pip install 'fastmat-vlm[adapters]'") from error
    _check_targets(model, settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(_adapters(module)):
            module.register_forward_pre_hook(_no_fast_path)
    _check_heard(model)


def merged(model: Model) -> Model:
    """A copy of `model` in which the adapters have been added to the weights: its plain class, names and shapes."""
    assert isinstance(model, nn.Module)
    whole = copy.deepcopy(model)
    for name, layer in list(_adapters(whole)):
        if hasattr(layer, "unload_and_optionally_merge_module"):  # attention, whose two matrices are merged apart
            plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            layer.merge(safe_merge=True)
            plain = layer.get_base_layer()
        parent, _, own = name.rpartition(".")
        setattr(whole.get_submodule(parent), own, plain)
    for module in whole.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _no_fast_path:
                del module._forward_pre_hooks[key]
    if hasattr(whole, "peft_config"):
        del whole.peft_config
    return whole.requires_grad_(True)


def merge_file(model: VisionLanguageModel, path: Path) -> None:
    """Rewrite a weights file of `model`, which has adapters, as one of the plain model; what it says of itself stays.

    `model` gets the weights of the file.
    """
    assert isinstance(model, nn.Module)
    load_weights(model, path)
    with safe_open(path, "pt") as file:
        told = (file.metadata() or {}).get("fastmat")
    save_weights(merged(model), path, metadata=None if told is None else json.loads(told))


def _check_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    named = dict(model.named_modules())
    for target in targets:
        meant = [module for name, module in named.items() if f".{name}".endswith(f".{target}")]
        if not meant:
            known = sorted({name.rpartition(".")[2] for name, module in named.items() if isinstance(module, nn.Linear)})
            raise UserError(f"targets: no module is called '{target}'{nearest(target, known)}")
        wrong = next((module for module in meant if not isinstance(module, ADAPTABLE)), None)
        if wrong is not None:
            fit = ", ".join(kind.__name__ for kind in ADAPTABLE)
            raise UserError(f"targets: '{target}' is a {type(wrong).__name__}, and adapters fit {fit}")


def _adapters(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """The outermost adapted modules and their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
            yield name, module


def _no_fast_path(module: nn.Module, inputs: object) -> None:
    """A hook that does nothing: where there is one, nn.TransformerEncoderLayer calls its parts, and adapters act.

    Else, without gradients, it hands their first weights to one fused operator.
    """


def _check_heard(model: VisionLanguageModel) -> None:
    """Raise UserError unless every adapter's weights reach an embedding."""
    assert isinstance(model, nn.Module)
    device, size = model.logit_scale.device, model.image_transform.size
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        image = model.encode_image(torch.zeros(1, 3, size, size, device=device)).embeds
        text = model.encode_text(model.tokenize(["a"]).to(device)).embeds
        total = image.sum() + text.sum()
        reached: Sequence[Tensor | None] = [None] * len(named)
        if total.requires_grad:
            reached = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    deaf = [name for name, gradient in zip(named, reached, strict=True) if gradient is None]
    if deaf:
        raise UserError(
            f"targets: the adapter of '{deaf[0].split('.lora_')[0]}' changes nothing, because another module reads its "
            "weights directly; name that one, as 'attn' in place of 'out_proj'"
        )
