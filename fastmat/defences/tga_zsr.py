"""TGA-ZSR (Yu et al., NeurIPS 2024): where the text looks in the image must not change.

The text-guided attention of an image is the cosine of each of its places with a text, scaled to [0, 1] over the places
and enlarged bilinearly to the image. Loss: cross-entropy of adversarial images, plus 0.08 times the distance between
the attention of the trained model on the adversarial image and that of the frozen original on the clean one (2-norm
over pixels, mean over images), plus 0.05 times the same with the trained model's attention on the clean image.
Published: ViT-B/32, image tower alone, eps 1/255, 2 PGD steps of 1/255 on the cross-entropy; the text is the prompt of
the image's class. On captions it is the mean of the image's own, and InfoNCE takes the place of the cross-entropy.

One departure: attention trains the tower and not the projection, which it takes as a constant of the step. The weights
outside of the forward are whole under no engine that shards them.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmat.attacks.draws import Draws
from fastmat.attacks.pgd import PGD
from fastmat.defences.base import Features, Views
from fastmat.defences.classes import Against, Contrast, Prompts
from fastmat.defences.inner import attacking
from fastmat.defences.teacher import Teacher
from fastmat.defences.terms import check_weights
from fastmat.errors import UserError
from fastmat.models.protocol import ImageState, VisionLanguageModel
from fastmat.types import Batch, ThreatModel


class TGAZSR:
    """against: "captions" of the batch, or all "classes" of a labelled set. teacher: the original model, copied here.

    steps, step_size (pixel units; None: eps), random_start: the inner PGD.
    refinement_weight, constraint_weight: of the attention on adversarial and on clean images (the paper's alpha, beta).
    trains: ("image",) as published; on captions also both, while attention always takes the text as given.
    Raises UserError for another `against`, classes on a set without labels, a negative weight, and in `perturb` for a
    model whose image tower gives no square grid of tokens that its projection fits, and for a teacher of another width.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        teacher: VisionLanguageModel,
        against: Against = "captions",
        prompts: Prompts | None = None,
        steps: int = 2,
        step_size: float | None = None,
        random_start: bool = True,
        refinement_weight: float = 0.08,
        constraint_weight: float = 0.05,
        trains: tuple[str, ...] = ("image",),
    ) -> None:
        check_weights({"refinement_weight": refinement_weight, "constraint_weight": constraint_weight})
        self.contrast = Contrast(against, prompts, text_trains="text" in trains)
        self.teacher = Teacher(teacher)
        self.attack = PGD(
            threat=threat,
            objective=self.contrast.objective(),
            steps=steps,
            step_size=threat.eps if step_size is None else step_size,
            random_start=random_start,
        )
        self.weights = {"refinement": refinement_weight, "constraint": constraint_weight}
        self.trains = trains
        self._projection: nn.Module = nn.Identity()

    def perturb(self, model: VisionLanguageModel, batch: Batch, draws: Draws) -> Views:
        with attacking(model):
            self.teacher.check(model)
            self._projection = copy.deepcopy(model.image_projection)
            task, context = self.contrast.task(model, batch)
            images = self.attack.run(model, task, self.contrast.everyone(context), draws)[0].detach()
            # The trained model's own text features, also for the original, as published.
            texts = self.contrast.own_texts(task, context)
        original = self.teacher.images(batch.images)
        attention = text_guided_attention(self.teacher.model.image_projection, original, texts, images.shape[-2:])
        return Views(
            images={"clean": batch.images, "adv": images},
            texts=self.contrast.texts(batch),
            targets={"attention": attention, "own_texts": texts, **self.contrast.targets(task, context)},
        )

    def loss(self, features: Features) -> dict[str, Tensor]:
        original, texts = features.targets["attention"], features.targets["own_texts"]
        terms = self.contrast.term(features, "adv")
        for name, view in (("refinement", "adv"), ("constraint", "clean")):
            attention = text_guided_attention(self._projection, features.images[view], texts, original.shape[-2:])
            apart = (attention - original).flatten(1).norm(dim=1).mean()
            terms[f"attention/{name}"] = self.weights[name] * apart
        return terms


def text_guided_attention(
    projection: nn.Module, state: ImageState, texts: Tensor, size: tuple[int, ...] | torch.Size
) -> Tensor:
    """[B, *size] in [0, 1]: how much each place of an image looks like its text [B, E], a unit row.

    Raises UserError for a state without a square grid of tokens that `projection` fits.
    """
    cosine = (F.normalize(place_embeds(projection, state), dim=-1) * texts[:, None]).sum(-1)
    low, high = cosine.aminmax(dim=1, keepdim=True)
    side = math.isqrt(cosine.shape[1])
    grid = ((cosine - low) / (high - low).clamp_min(1e-8)).view(-1, 1, side, side)
    return F.interpolate(grid, tuple(size), mode="bilinear").squeeze(1)


def place_embeds(projection: nn.Module, state: ImageState) -> Tensor:
    """[B, N, E]: each place of the image, as the projection embeds it.

    A projection of tokens embeds a token. One of the flattened grid, as of fastmat's small model, embeds the grid in
    which every other place is zero.
    """
    if state.tokens is None:
        raise UserError("tga_zsr needs image tokens, and this image tower gives none: take a ViT, or another defence")
    tokens = state.tokens.float()
    _, places, width = tokens.shape
    if math.isqrt(places) ** 2 != places:
        raise UserError(f"tga_zsr needs image tokens in a square grid, and this image tower gives {places} of them")
    wanted = getattr(projection, "in_features", None)
    if wanted == width:
        return projection(tokens)
    if wanted == width * places:
        alone = torch.diag_embed(tokens.transpose(1, 2), dim1=1, dim2=3)  # [B, place, D, N], zero but at the place
        return projection(alone.flatten(2))
    raise UserError(
        f"tga_zsr needs an image projection that fits the image tokens, which are {width} wide; this one takes {wanted}"
    )
