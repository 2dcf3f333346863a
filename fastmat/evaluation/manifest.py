"""The schema of an adversarial set's files, and the fingerprint that ties it to a configuration."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from fastmat.evaluation.results import STRICT, Threat
from fastmat.types import ImageTransform

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Shard(BaseModel):
    """A finished shard. rows: images in it; text_bytes: length of its lines in `texts.jsonl`; seconds of the attack."""

    model_config = STRICT
    file: str = Field(pattern=r"^images-\d{5}\.safetensors$")
    sha256: Sha256
    rows: int = Field(ge=1)
    text_bytes: int = Field(ge=0)
    text_sha256: Sha256
    seconds: float = Field(ge=0)


class Manifest(BaseModel):
    """model, data: fingerprints of the surrogate and of the clean set; config: the resolved configuration, whose hash
    is config_sha256. image_transform: how the surrogate wanted pictures. n_images: size of the finished set.
    source: where the clean images are found again: {"data": its section, "limit", "rows": those attacked, or null}."""

    model_config = STRICT
    format: Literal["fastmat adversarial set 1"] = "fastmat adversarial set 1"
    model: Sha256
    data: Sha256
    config_sha256: Sha256
    config: dict[str, Any]
    surrogate: str
    image_transform: ImageTransform
    attack: str
    threat: Threat
    dataset: str
    split: str
    seed: int
    n_images: int = Field(ge=1)
    source: dict[str, Any] = {}
    shards: list[Shard] = []

    @property
    def n_done(self) -> int:
        """Images in finished shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """Where the lines of finished shards end in `texts.jsonl`."""
        return sum(shard.text_bytes for shard in self.shards)


class TextLine(BaseModel):
    model_config = STRICT
    image: str
    index: int
    caption: int
    source: str
    adversarial: str
    words_changed: int


def config_fingerprint(config: dict[str, Any]) -> str:
    """sha256 of a JSON-like configuration, whatever the order of its keys."""
    return sha256(json.dumps(config, sort_keys=True, default=str).encode())


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
