"""Models and labelled batches for the tests of defences."""

import torch

from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.types import Batch

PROMPTS = (("a red dog", "the red dog"), ("a cat", "the cat"), ("a big tree", "the big tree"), ("a bird", "the bird"))
LABELS = (2, 0, 2, 1, 0)


def labelled_batch(*, seed: int = 0) -> Batch:
    """Five images of three of the four classes; the first image comes with both prompts of its class."""
    captions = [PROMPTS[label][: 2 if i == 0 else 1] for i, label in enumerate(LABELS)]
    return Batch(
        images=torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(seed)),
        texts=tuple(text for own in captions for text in own),
        txt2img=torch.tensor([0, 0, 1, 2, 3, 4]),
        index=torch.arange(5) + 50,
        group=torch.tensor(LABELS) + 7,
    )


def stateful(seed: int = 0) -> DualEncoder:
    """A tiny model in train mode with all that an attack could leave a trace in: a batch norm, which an attack folds,
    and dropout."""
    model = tiny_clip(seed=seed)
    model.image_tower.blocks[1] = torch.nn.BatchNorm2d(8)
    model.image_tower.blocks.append(torch.nn.Dropout(0.2))
    return model.train()


class LastWord:
    """Candidates without a language model: the last word may become any of three."""

    mlm = None

    def __call__(self, captions: list[str], *, quirks: Quirks) -> list[dict[int, tuple[str, ...]]]:
        return [{len(text.split(" ")) - 1: ("stone", "cloud", "fire")} for text in captions]


def class_features(model: DualEncoder) -> torch.Tensor:
    """[C, E]: the normalised mean of the unit features of each class's prompts, one prompt at a time."""
    rows = []
    with torch.no_grad():
        for texts in PROMPTS:
            total = sum(model.encode_text(model.tokenize([text])).features[0] for text in texts)
            rows.append(total / total.norm())
    return torch.stack(rows)
