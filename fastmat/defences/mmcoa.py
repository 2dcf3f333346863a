"""MMCoA (arXiv 2404.19287): adversarial images against clean texts, and clean images against adversarial texts.

Published: CLIP ViT-B/32, both towers, eps 1/255, 10 PGD steps on the cross-entropy over class prompts; BERT-Attack on
the text, whose choice is the KL from the clean embedding. The attacks are independent of each other, and the pair
(adversarial, adversarial) has no term. Loss: 0.5 times the sum of both cross-entropies, image to text and text to
image, for either pair. On captions the image attack ascends the contrastive loss instead.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.attacks.pgd import PGD
from fastmat.attacks.word_substitution import WordSubstitution
from fastmat.defences.base import Features, Views
from fastmat.defences.classes import Against, Contrast, Prompts
from fastmat.defences.inner import attacking
from fastmat.defences.phases import text_attack
from fastmat.defences.terms import check_weights, contrastive_between
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.text.candidates import CandidateSource
from fastmat.types import Batch, ThreatModel


class MMCoA:
    """against: what the image attack contrasts with: the batch's captions, or all classes of a labelled set.

    steps, step_size (pixel units; None: eps/4), random_start: the image attack. candidates, max_words: the text attack.
    image_weight, text_weight: of the pair with adversarial images, and with adversarial texts.
    trains: which towers. The quirk `pairs_only` makes captions of other images negatives, whatever their group.
    Raises UserError for another `against`, classes on a set without labels, and a weight that is negative.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        candidates: CandidateSource,
        max_words: int = 1,
        against: Against = "captions",
        prompts: Prompts | None = None,
        steps: int = 10,
        step_size: float | None = None,
        random_start: bool = True,
        image_weight: float = 0.5,
        text_weight: float = 0.5,
        trains: tuple[str, ...] = ("image", "text"),
        quirks: Quirks | None = None,
    ) -> None:
        check_weights({"image_weight": image_weight, "text_weight": text_weight})
        self.quirks = quirks or Quirks()
        self.contrast = Contrast(against, prompts, text_trains="text" in trains)
        self.image_attack = PGD(
            threat=threat,
            objective=self.contrast.objective(),
            steps=steps,
            step_size=step_size,
            random_start=random_start,
            quirks=self.quirks,
        )
        self.text_attack = WordSubstitution(
            candidates=candidates,
            max_words=max_words,
            choice="kl",
            importance="embeds",
            compare="embeds",
            quirks=self.quirks,
        )
        self.image_weight = image_weight
        self.text_weight = text_weight
        self.trains = trains

    def perturb(self, model: VisionLanguageModel, batch: Batch, draws: Draws) -> Views:
        with attacking(model):
            task, context = self.contrast.task(model, batch)
            images, _ = self.image_attack.run(model, task, self.contrast.everyone(context), draws)
            with text_attack():
                texts = self.text_attack.search(model, self.text_attack.plan(model, batch.texts))
        return Views(
            images={"clean": batch.images, "adv": images.detach()},
            texts={"clean": batch.texts, "adv": texts},
            targets={"index": batch.index, "text_index": batch.index[batch.txt2img]},
        )

    def loss(self, features: Features) -> dict[str, Tensor]:
        if self.quirks.pairs_only:
            if features.everyone is not None:
                raise UserError("the quirk pairs_only is for one process, as the published code: run without others")
            own = features.targets
            features = replace(features, group=own["index"], text_group=own["text_index"])
        # `contrastive_between` is the mean of both directions.
        return {
            "contrastive/adv-clean": 2 * self.image_weight * contrastive_between(features, "adv", "clean"),
            "contrastive/clean-adv": 2 * self.text_weight * contrastive_between(features, "clean", "adv"),
        }
