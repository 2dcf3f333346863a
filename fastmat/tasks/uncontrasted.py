"""Models that compare no image with a text (entailment, captioning), and what attacks may use their gradients."""

from __future__ import annotations

import torch

from fastmat.attacks.base import Attack
from fastmat.attacks.bert_attack import BertAttack
from fastmat.attacks.caption_loss import CaptionLoss
from fastmat.attacks.co_attack import CoAttack
from fastmat.attacks.entailment import KLEntailment
from fastmat.attacks.fusion import KLFusedFromClean
from fastmat.attacks.objectives import KLFromClean, SquaredL2FromClean
from fastmat.attacks.sep import SepAttack
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel, captions_images, entails
from fastmat.types import AttackContext

WITHIN_ONE_MODALITY = (KLFromClean, SquaredL2FromClean)
USABLE = {
    "entailment": "co_attack or sep with representation cls or fusion, bert_attack with choice kl, or pgd and apgd "
    "with objective kl_entailment, kl_fused, kl or squared_l2",
    "captions": "pgd and apgd with objective caption_loss, kl or squared_l2",
}


def contrasts(model: VisionLanguageModel) -> bool:
    """Whether images and texts have features in one space."""
    return not entails(model) and not captions_images(model)


def check_surrogate(attack: Attack, model: VisionLanguageModel, *, label: str) -> None:
    """Raises UserError when the attack `label` needs what the model has not."""
    if contrasts(model):
        return
    objective = getattr(attack, "objective", None)
    if captions_images(model):
        kind, usable = "captions", isinstance(objective, (*WITHIN_ONE_MODALITY, CaptionLoss))
    elif isinstance(attack, CoAttack):
        kind, usable = "entailment", attack.representation != "embeds"
    elif isinstance(attack, BertAttack):
        kind, usable = "entailment", attack.words.choice == "kl"
    else:
        known = (*WITHIN_ONE_MODALITY, KLFusedFromClean, KLEntailment)
        kind, usable = "entailment", isinstance(attack, SepAttack) or isinstance(objective, known)
    if not usable:
        raise UserError(
            f"attacks.{label}: a model for {kind} has no features that compare images with texts, which this attack "
            f"moves: use {USABLE[kind]}, or name surrogates that have them"
        )


def no_context(device: torch.device | str) -> AttackContext:
    """Nothing to contrast with."""
    none, groups = torch.zeros(0, 0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    return AttackContext(image_features=none, image_group=groups, text_features=none, text_group=groups)
