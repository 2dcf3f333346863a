"""What a frozen teacher makes of the clean images of a set, on disk: computed once, read by every run after that.

    FOLDER/<key>.safetensors    "embeds" fp32 [N, E], un-normalised, one row per image of the set

The key is a hash of the teacher's weights and of all that the pixels depend on. The rows are computed in the order of
the set, in batches of one size, so that they are a function of the key: a run that goes on reads what it read before.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmat.data.image_cache import describe
from fastmat.data.loader import evaluation_batches
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.models.weights import read_state, save_state, weights_hash
from fastmat.types import ImageTransform

BATCH = 64

log = logging.getLogger(__name__)


class TeacherCache:
    """Embeddings of `dataset` at `transform`, below `folder`; nothing happens before a teacher asks.

    dataset: what `Batch.index` counts. agreed: calls its argument in one process and gives all of them what came of it
        (`Peers.agreed`); by default there is one process. workers: processes that decode.
    """

    def __init__(
        self,
        folder: Path,
        dataset: RetrievalSet,
        transform: ImageTransform,
        *,
        agreed: Callable[[Callable[[], Path]], Path] = lambda make: make(),
        workers: int = 0,
    ) -> None:
        self._folder = folder
        self._dataset = dataset
        self._transform = transform
        self._agreed = agreed
        self._workers = workers

    def embeds(self, teacher: VisionLanguageModel) -> Tensor:
        """[N, E] on the teacher's device; made first where it is missing. Every process of a run calls it.

        Raises UserError for a folder that cannot be used and for a file that is damaged.
        """
        path = self._agreed(lambda: self._made(teacher))
        rows = read_state(path).get("embeds")
        if rows is None or rows.ndim != 2 or len(rows) != self._dataset.n_images:
            raise UserError(f"teacher cache {path} is damaged: delete this file, it is made again")
        return rows.to(teacher.logit_scale.device)

    def _made(self, teacher: VisionLanguageModel) -> Path:
        assert isinstance(teacher, nn.Module)
        made_of = [weights_hash(teacher), describe(self._dataset, self._transform), BATCH]
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
        path = self._folder / f"{key}.safetensors"
        try:
            if not path.exists():
                log.info("teacher cache: %d images to %s", self._dataset.n_images, path)
                self._folder.mkdir(parents=True, exist_ok=True)
                save_state({"embeds": self._computed(teacher)}, path)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"teacher_cache {self._folder} cannot be used ({reason}): give another folder") from error
        return path

    def _computed(self, teacher: VisionLanguageModel) -> Tensor:
        device = teacher.logit_scale.device
        batches = evaluation_batches(self._dataset, self._transform, batch_size=BATCH, workers=self._workers)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return torch.cat([teacher.encode_image(batch.images.to(device)).embeds.float().cpu() for batch in batches])
