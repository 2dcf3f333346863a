"""The models and experts of pipelines, each model loaded once, however many experts see with it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastmat.build import Component, build_expert, build_model
from fastmat.cli.encoded import Encoded
from fastmat.cli.load import plain
from fastmat.cli.making import files_of
from fastmat.cli.pipeline_config import PipelineConfig
from fastmat.data.loader import EvaluationBatches, evaluation_batches
from fastmat.data.retrieval import RetrievalSet
from fastmat.evaluation.manifest import config_fingerprint
from fastmat.pipeline.ask import Asked
from fastmat.types import ImageTransform


@dataclass(kw_only=True)
class Opening:
    """What is loaded stays until this goes."""

    config: PipelineConfig
    dataset: RetrievalSet
    device: torch.device
    loaded: list[tuple[Component, Encoded]] = field(default_factory=list, init=False)

    def load(self, component: Component, *, where: str) -> Encoded:
        for other, encoded in self.loaded:
            if other == component:
                return encoded
        model = build_model(component, device=self.device, where=where)
        encoded = Encoded(component, model, batches_of(self.config, self.dataset, model.image_transform))
        self.loaded.append((component, encoded))
        return encoded

    def experts(self, name: str) -> dict[str, Asked]:
        """The experts of the pipeline `name`, each on its model."""
        captions = tuple(caption for own in self.dataset.captions for caption in own)
        experts = {}
        for label, chosen in self.config.pipelines[name].experts.items():
            where = f"pipelines.{name}.experts.{label}"
            seen = self.load(chosen.model, where=f"{where}.model")
            expert = build_expert(chosen.expert, vlm=seen.model, gallery=captions, where=where)
            settings = {"expert": plain(chosen.expert), "files": files_of(chosen.expert), "model": seen.identity}
            experts[label] = Asked(expert=expert, identity=config_fingerprint(settings), weights=seen.weights)
        return experts


def batches_of(config: PipelineConfig, dataset: RetrievalSet, transform: ImageTransform) -> EvaluationBatches:
    """The pictures, cut and resized by `transform`."""
    return evaluation_batches(
        dataset,
        transform,
        batch_size=config.batch_size,
        workers=config.workers,
        image_cache=config.image_cache,
    )
