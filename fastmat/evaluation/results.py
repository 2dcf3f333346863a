"""What an evaluation leaves behind, as two files; nothing else passes from evaluation to report.

`results.json`, all rates in percent:

    {"rows": [ROW, ...], "config": the resolved config, "environment": {...}, "training": {...}}

    ROW: surrogate, victim      names of the model attacked and of the model judged
         white_box              both have the same weights; where it is missing: both have the same name
         defence                none | finetune | tecoa_itr | fare | mat | ...: how the victim was trained
         attack                 none (clean) | pgd | bert_attack | sep | sga | ...; of an ensemble LABEL.RUN, and LABEL:
                                each query's worst rank over its runs and the other attacks with the same budgets
         threat                 {"eps": radius in [0, 1] pixel units, "norm": "linf" | "l2", "max_words", "budgeted"};
                                a perturbation such as fog has no budget: budgeted is false, eps and max_words are 0
         dataset, split, seed
         n_images, n_captions   queries: the images and captions that were attacked
         gallery_images         images ranked, where only some of them were attacked; null: n_images
         scoring                itc: by cosine; itm, itm+cosine: the nearest by cosine, put in order by the matching
                                logit, or by it and the cosine
         tr@1 tr@5 tr@10        text retrieval (image to text) recall
         ir@1 ir@5 ir@10        image retrieval (text to image) recall
         asr_tr@1 ... asr_ir@10 of the queries right when clean, the share wrong after the attack; null: clean, or
                                none was right
         ci                     {any of the above: [low, high]}, 95 % bootstrap over images
         max_distance           largest distance found on the stored images, in the threat's norm and units
         max_words_changed      most substituted words found in one caption
         seconds, pairs_per_s   of the attack alone, all processes added up, captions counted as pairs; null: clean
         truths                 {label: figures under another ground truth, or, at "LABEL/pairs", under the original
                                pairs of the same queries: n_images, n_captions (queries judged), right_captions,
                                right_images (per query, mean), metrics and ci, which hold the rates above (of the
                                best right answer) and tr_rp ir_rp (R-precision), tr_map@r ir_map@r; null: no query}
         inputs                 sha256 of what the row depends on; a resumed run keeps a row whose inputs are its own
    environment: python, torch, fastmat, device, cpu_count, platform
    training (optional): {defence: [{"step", "loss", "pairs_per_s"}, ...]}

`examples.json`: {"chosen": how they were picked, "examples": [see `Example`, ...]}, pictures inside as base64 PNG.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from fastmat.data.truth import PAIRS
from fastmat.errors import UserError

Percent = Annotated[float, Field(ge=0, le=100)]
Png = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$", description="base64")]
Model = TypeVar("Model", bound=BaseModel)
STRICT = ConfigDict(extra="forbid", populate_by_name=True, frozen=True)


class Threat(BaseModel):
    """The budgets an attack was given; those of a clean row are zero."""

    model_config = STRICT
    eps: float = Field(default=0.0, ge=0)
    norm: Literal["linf", "l2"] = "linf"
    max_words: int = Field(default=0, ge=0)
    budgeted: bool = True


class Setting(BaseModel):
    """What was evaluated: everything about a row that is not measured."""

    model_config = STRICT
    surrogate: str
    victim: str
    white_box: bool
    defence: str
    attack: str = "none"
    threat: Threat = Threat()
    dataset: str
    split: str
    seed: int
    scoring: str = "itc"

    @model_validator(mode="before")
    @classmethod
    def same_name(cls, data: Any) -> Any:
        """Without the key, one name means one model."""
        if isinstance(data, Mapping) and "white_box" not in data:
            return {**data, "white_box": data.get("surrogate") == data.get("victim")}
        return data

    def setting(self) -> Setting:
        """What was evaluated."""
        return Setting(**{name: getattr(self, name) for name in Setting.model_fields})


class UnderTruth(BaseModel):
    """What was measured under one ground truth; see the module's docstring."""

    model_config = STRICT
    n_images: int = Field(ge=0)
    n_captions: int = Field(ge=0)
    right_captions: float | None = Field(ge=1)
    right_images: float | None = Field(ge=1)
    metrics: dict[str, Percent | None]
    ci: dict[str, tuple[Percent, Percent]]


class Row(Setting):
    """A setting and what was measured; see the module's docstring."""

    n_images: int = Field(ge=1)
    n_captions: int = Field(ge=1)
    gallery_images: int | None = Field(default=None, ge=1)
    tr_1: Percent = Field(alias="tr@1")
    tr_5: Percent = Field(alias="tr@5")
    tr_10: Percent = Field(alias="tr@10")
    ir_1: Percent = Field(alias="ir@1")
    ir_5: Percent = Field(alias="ir@5")
    ir_10: Percent = Field(alias="ir@10")
    asr_tr_1: Percent | None = Field(alias="asr_tr@1")
    asr_tr_5: Percent | None = Field(alias="asr_tr@5")
    asr_tr_10: Percent | None = Field(alias="asr_tr@10")
    asr_ir_1: Percent | None = Field(alias="asr_ir@1")
    asr_ir_5: Percent | None = Field(alias="asr_ir@5")
    asr_ir_10: Percent | None = Field(alias="asr_ir@10")
    ci: dict[str, tuple[Percent, Percent]]
    max_distance: float = Field(ge=0)
    max_words_changed: int = Field(ge=0)
    seconds: float | None = Field(ge=0)
    pairs_per_s: float | None = Field(ge=0)
    truths: dict[str, UnderTruth] = {}
    inputs: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")

    @model_serializer(mode="wrap")
    def without_empty(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The key is there where there is something to it."""
        row: dict[str, Any] = written(self)
        if not self.truths:
            row.pop("truths", None)
        return row

    def value(self, metric: str) -> float | None:
        """A rate by its name in the file, "tr@1" ... "asr_ir@10"."""
        return getattr(self, metric.replace("@", "_"))

    def judged(self) -> Iterator[tuple[str, UnderTruth, UnderTruth | None]]:
        """Label of another ground truth, figures under it, and, if there, under the original pairs of its queries."""
        for label, found in self.truths.items():
            if not label.endswith(PAIRS):
                yield label, found, self.truths.get(label + PAIRS)


class TrainingPoint(BaseModel):
    model_config = STRICT
    step: int
    loss: float
    pairs_per_s: float | None = None


class Results(BaseModel):
    model_config = STRICT
    rows: list[Row]
    config: dict[str, Any]
    environment: dict[str, Any]
    training: dict[str, list[TrainingPoint]] = {}


class RetrievedText(BaseModel):
    model_config = STRICT
    text: str
    correct: bool


class RetrievedImage(BaseModel):
    model_config = STRICT
    png: Png
    correct: bool


class Example(BaseModel):
    """One image and one of its captions, before and after the attack.

    difference: 0.5 + magnification * (adversarial - clean), as a picture. distance: in the threat's norm.
    texts_*: the captions that the image retrieves, best first; images_*: the images that the caption retrieves.
    image_rank_*, caption_rank_*: place of the best correct one, 1 is best.
    """

    model_config = STRICT
    image: str
    setting: Setting
    clean: Png
    adversarial: Png
    difference: Png
    magnification: int = Field(ge=1)
    distance: float = Field(ge=0)
    caption_before: str
    caption_after: str
    texts_before: list[RetrievedText]
    texts_after: list[RetrievedText]
    images_before: list[RetrievedImage]
    images_after: list[RetrievedImage]
    image_rank_before: int = Field(ge=1)
    image_rank_after: int = Field(ge=1)
    caption_rank_before: int = Field(ge=1)
    caption_rank_after: int = Field(ge=1)


class Examples(BaseModel):
    """chosen: how the examples were picked, as a sentence for the reader."""

    model_config = STRICT
    chosen: str
    examples: list[Example]


def environment(device: torch.device | str) -> dict[str, Any]:
    """Versions and machine, without host names and paths."""
    device = torch.device(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastmat": metadata.version("fastmat-vlm"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_count": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def write_results(folder: Path, results: Results) -> Path:
    """`folder/results.json`, replaced as a whole or not at all."""
    return write_atomic(folder / "results.json", to_json(results))


def read_results(path: Path) -> Results:
    """The results in a file, or in `results.json` of a folder. UserError names the key that does not fit."""
    return read_json(path / "results.json" if path.is_dir() else path, Results)


def write_examples(folder: Path, examples: Examples) -> Path:
    """`folder/examples.json`, replaced as a whole or not at all."""
    return write_atomic(folder / "examples.json", to_json(examples))


def read_examples(path: Path) -> Examples:
    return read_json(path, Examples)


def to_json(model: BaseModel) -> bytes:
    return (
        json.dumps(model.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    ).encode()


def read_json(path: Path, schema: type[Model]) -> Model:
    """A JSON file that follows `schema`; UserError names the file and the first key that does not."""
    try:
        return schema.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {f'key {key}: ' if key else ''}{first['msg']}") from None


def write_atomic(path: Path, content: bytes) -> Path:
    """Write `content` under a temporary name, flush it to the disk and rename; readers see the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
