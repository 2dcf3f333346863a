"""SA-AET: DRA on ordered mixtures, in a subspace of the captions (Jia et al., TPAMI 2025, arXiv 2411.02669).

Constants and order follow the authors' code, jiaxiaojunQAQ/SA-AET, SA_AET.py and eval_AET.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.dra import DRA, Choice, Search, drawn_weights
from fastmat.attacks.draws import Draws, SeededDraws
from fastmat.attacks.objectives import Bound
from fastmat.attacks.word_substitution import TextPlan
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.ops import cosine_to_set
from fastmat.quirks import Quirks
from fastmat.text.candidates import CandidateSource
from fastmat.types import AttackContext, Batch, ThreatModel


class SAAET(Attack):
    """Semantic-aligned attack from the adversarial evolution triangle.

    DRA with three changes. A mixture weighs the clean image most and the current iterate least (`triangle_weights`).
    The trial that judges it is projected. The image ascends minus the sum of dot products to its captions after both
    are projected to a subspace of a corpus' text features, without the corpus' first direction (`projector`).

    The corpus is a random `share` of the captions in the context, chosen by `seed`. So the attack is transductive, as
    published: in an evaluation it knows other captions of the gallery. Features are those of the context, which the
    surrogate read without BERT's round trip. Computed once for a context, so no split of a batch changes it; called
    without a context, the corpus is a share of the batch's own captions.

    share 0.4, steps 10, step_size eps/4, samples 5, text_weights (0.6, 0.2, 0.2): the published code, at eps 8/255.
    choice, scales, noise_std, candidates, beam: as in DRA; "batch" is the published choice.
    Raises UserError as DRA does, for a share outside (0, 1], and, when called, for a corpus of a single direction.
    """

    official = DRA.official

    def __init__(
        self,
        *,
        threat: ThreatModel,
        candidates: CandidateSource,
        share: float = 0.4,
        steps: int = 10,
        step_size: float | None = None,
        samples: int = 5,
        choice: Choice = "image",
        text_weights: Sequence[float] = (0.6, 0.2, 0.2),
        scales: Sequence[float] = (0.5, 0.75, 1.25, 1.5),
        noise_std: float = 0.05,
        beam: int = 1,
        quirks: Quirks | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        if not 0 < share <= 1:
            raise UserError(f"share must be in (0, 1], the share of all captions that make the corpus, got {share}")
        self.share = share
        self.dra = DRA(
            threat=threat,
            candidates=candidates,
            steps=steps,
            step_size=step_size,
            samples=samples,
            choice=choice,
            text_weights=text_weights,
            scales=scales,
            noise_std=noise_std,
            beam=beam,
            quirks=quirks,
        )
        self.splits = self.dra.splits
        self._known: tuple[Tensor, Tensor] | None = None  # a context's text features and their projector

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        sga = self.dra.sga

        def away(model: VisionLanguageModel, batch: Batch, plan: TextPlan) -> Bound:
            own = sga.words.features(model, batch.texts, max_length=sga.quirks.mid_max_length, plan=plan)
            # The projector is symmetric and its own square: applied to one side, it is applied to both.
            own = own @ self.projector_of(context.text_features)
            return lambda state: -cosine_to_set(state.features, own, batch.txt2img)

        search = Search(away=away, mix=triangle_weights, project_trials=True)
        return self.dra.along(search, model, batch, draws)

    def projector_of(self, text_features: Tensor) -> Tensor:
        """[E, E], of a share of `text_features` [M, E]; kept while they are the same tensor."""
        if self._known is None or self._known[0] is not text_features:
            total = len(text_features)
            order = SeededDraws(self.seed).uniform("corpus", torch.arange(total), ()).argsort(stable=True)
            # Two at least, since the first direction goes; published, two captions' 40 % are none.
            corpus = text_features[order[: max(2, int(self.share * total))].to(text_features.device)]
            self._known = text_features, projector(corpus)
        return self._known[1]


def projector(corpus: Tensor) -> Tensor:
    """[E, E] fp32, onto the directions of text features `corpus` [M, E] but the first, by singular value.

    Directions within rounding of zero are none of the corpus'. Published, they are kept, which is the same wherever
    min(M, E) directions are there; else what remains of the decomposition is arbitrary, or not of the corpus.
    Raises UserError for fewer than two directions, of which nothing would remain.
    """
    _, values, directions = torch.linalg.svd(corpus.double(), full_matrices=False)
    smallest = values[:1] * max(corpus.shape) * torch.finfo(torch.float32).eps
    kept = directions[values > smallest][1:]
    if not len(kept):
        raise UserError(
            f"{len(corpus)} caption{'s' * (len(corpus) > 1)} of the context make a corpus of one direction, and SA-AET "
            "drops the first: attack a set of more and different captions, or raise share"
        )
    return (kept.T @ kept).float()


def triangle_weights(draw: Tensor) -> Tensor:
    """Weights [..., 3] of current, clean and previous image from `draw` [..., 2], uniform in (-1, 1).

    Whole percents with 1 <= current < previous < clean that sum to 1, distributed as in the published code, which draws
    the current image's uniformly in 1..100 and the clean one's in what is left, again until they are in order.

    >>> triangle_weights(torch.tensor([[-0.999, -0.999], [0.0, 0.0], [0.999, 0.999]])).mul(100).round().int().tolist()
    [[1, 50, 49], [11, 61, 28], [32, 35, 33]]
    """
    current = torch.arange(1, 33, device=draw.device)
    lowest = (100 - current) // 2 + 1  # more than half of what is left, so more than the previous image's
    room = 100 - 2 * current - lowest
    return drawn_weights(draw, room / (100 - current), lowest, room)
