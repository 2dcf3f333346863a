"""A model of an evaluation, with the data as it sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property

from fastmat.build import Component
from fastmat.cli.common import fingerprint
from fastmat.cli.load import plain
from fastmat.data.loader import EvaluationBatches
from fastmat.data.truth import Truth
from fastmat.evaluation.evaluate import Gallery, encode_gallery, gallery_context, gallery_ranks
from fastmat.evaluation.manifest import config_fingerprint
from fastmat.evaluation.metrics import Ranks
from fastmat.evaluation.rerank import Rerank
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import AttackContext


class Encoded:
    """A model with the data as it wants it. weights: their sha256; its clean gallery is encoded when first asked for.

    identity: sha256 of what its clean features depend on. rerank: its second stage, None: by cosine alone;
    second_stage: what a row depends on because of it. truths: ground truths that its ranks are judged under as well.
    """

    def __init__(
        self,
        component: Component,
        model: VisionLanguageModel,
        batches: EvaluationBatches,
        *,
        rerank: Rerank | None = None,
        truths: Mapping[str, Truth] | None = None,
    ) -> None:
        self.model = model
        self.batches = batches
        self.rerank = rerank
        self.truths = truths
        self.scoring = "itc" if rerank is None else rerank.scoring(model)
        self.second_stage = {} if rerank is None else {"scoring": self.scoring, "rerank_k": rerank.k}
        self.weights = fingerprint(model)
        named = {key: value for key, value in component.plain().items() if key != "weights"}
        self.identity = config_fingerprint(
            {
                "model": plain(named),
                "weights": self.weights,
                "image_transform": asdict(batches.transform),
                "data": batches.dataset.fingerprint(),
            }
        )

    @cached_property
    def gallery(self) -> Gallery:
        return encode_gallery(self.model, self.batches, rerank=self.rerank)

    @cached_property
    def ranks(self) -> Ranks:
        return gallery_ranks(self.gallery, truths=self.truths)

    def ranks_of(self, rows: Sequence[int] | None) -> Ranks:
        """Clean ranks of the queries of the images `rows`, None: of all."""
        return self.ranks if rows is None else gallery_ranks(self.gallery, rows, truths=self.truths)

    @cached_property
    def context(self) -> AttackContext:
        return gallery_context(self.gallery)
