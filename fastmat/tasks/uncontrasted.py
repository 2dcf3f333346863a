"""Models that compare no image with a text (entailment, captioning), and what attacks may use their gradients."""

from __future__ import annotations

import torch

from fastmat.attacks.alternating import Alternating
from fastmat.attacks.base import Attack
from fastmat.attacks.bert_attack import BertAttack
from fastmat.attacks.caption_loss import CaptionLoss
from fastmat.attacks.cmi import CMI
from fastmat.attacks.co_attack import CoAttack
from fastmat.attacks.dra import DRA
from fastmat.attacks.entailment import KLEntailment
from fastmat.attacks.fusion import KLFusedFromClean
from fastmat.attacks.objectives import KLFromClean, SquaredL2FromClean
from fastmat.attacks.sa_aet import SAAET
from fastmat.attacks.sga import SGA
from fastmat.attacks.universal import Universal
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel, captions_images, entails
from fastmat.types import AttackContext

OF_CAPTIONS = (KLFromClean, SquaredL2FromClean, CaptionLoss)
OF_ENTAILMENT = (KLFromClean, SquaredL2FromClean, KLFusedFromClean, KLEntailment)
COMPARING = (SGA, CMI, DRA, SAAET, Alternating, Universal)
USABLE = {
    "entailment": "co_attack or sep with representation cls or fusion, bert_attack with choice kl, or pgd and apgd "
    "with objective kl_entailment, kl_fused, kl or squared_l2",
    "captions": "pgd and apgd with objective caption_loss, kl or squared_l2",
}


def contrasts(model: VisionLanguageModel) -> bool:
    """Whether images and texts have features in one space."""
    return not entails(model) and not captions_images(model)


def check_surrogate(attack: Attack, model: VisionLanguageModel, *, label: str) -> None:
    """Raises UserError when the attack `label` moves features that the model has not."""
    if contrasts(model):
        return
    kind, own = ("captions", OF_CAPTIONS) if captions_images(model) else ("entailment", OF_ENTAILMENT)
    objective = getattr(attack, "objective", None)
    compares = isinstance(attack, COMPARING) or (objective is not None and not isinstance(objective, own))
    if isinstance(attack, CoAttack):
        compares = attack.representation == "embeds"
    elif isinstance(attack, BertAttack):
        compares = attack.words.choice != "kl"
    if compares:
        raise UserError(
            f"attacks.{label}: a model for {kind} has no features that compare images with texts, which this attack "
            f"moves: use {USABLE[kind]}, or name surrogates that have them"
        )


def no_context(device: torch.device | str) -> AttackContext:
    """Nothing to contrast with."""
    none, groups = torch.zeros(0, 0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    return AttackContext(image_features=none, image_group=groups, text_features=none, text_group=groups)
