"""The examples of an evaluation: the same images for every victim, under one attack."""

from __future__ import annotations

from collections.abc import Iterable, Set
from pathlib import Path

from fastmat.evaluation.evaluate import Attacked
from fastmat.evaluation.examples import make_examples, pick_images
from fastmat.evaluation.metrics import Ranks
from fastmat.evaluation.rerank import Rerank
from fastmat.evaluation.results import Example, Examples, Setting, read_examples, write_examples
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import Batch


class Showcase:
    """`folder/examples.json`, written anew with every victim. attack: the label whose examples are wanted.

    The images are drawn once, among those that the first victim gets right when clean.
    """

    def __init__(self, folder: Path, *, attack: str | None, count: int, seed: int, ids: tuple[str, ...]) -> None:
        self.file = folder / "examples.json"
        self.attack = attack if count else None
        self.count = count
        self.seed = seed
        self.ids = ids
        self.examples: list[Example] = read_examples(self.file).examples if self.file.exists() else []
        # A resumed run shows the images that it began with.
        names = dict.fromkeys(example.image for example in self.examples)
        self.images = [ids.index(name) for name in names if name in ids]

    def wants(self, attack: str) -> bool:
        return attack == self.attack

    def keep(self, settings: Set[Setting]) -> None:
        """Drop the examples of other settings, and of attacks shown earlier."""
        kept = [
            example for example in self.examples if example.setting in settings and self.wants(example.setting.attack)
        ]
        if len(kept) < len(self.examples):
            self.examples = kept
            self.write()

    def add(
        self,
        victim: VisionLanguageModel,
        clean: Iterable[Batch],
        attacked: Iterable[Attacked],
        ranks: Ranks,
        setting: Setting,
        *,
        rerank: Rerank | None = None,
    ) -> None:
        """ranks: the victim's own, clean. clean: the data at the resolution that was attacked. rerank: its second
        stage."""
        if not self.images:
            self.images = pick_images(ranks, count=self.count, seed=self.seed)
        others = [example for example in self.examples if example.setting != setting]
        made = make_examples(victim, clean, attacked, images=self.images, ids=self.ids, setting=setting, rerank=rerank)
        self.examples = [*others, *made]
        self.write()

    def write(self) -> None:
        chosen = (
            f"{len(self.images)} images drawn at random (seed {self.seed}) among those whose caption the first model "
            "finds first when nothing is attacked; the same images for every model."
        )
        write_examples(self.file.parent, Examples(chosen=chosen, examples=self.examples))
