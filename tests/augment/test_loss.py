"""One-to-many, exactly: the loss of an augmented batch is the multi-positive formula written out pair by pair."""

import math

import torch
from batches import random_batch

from fastmat.attacks.draws import SeededDraws
from fastmat.augment.captions import CaptionDraw, CaptionPool
from fastmat.augment.image import ImageViews
from fastmat.defences.finetune import FineTune
from fastmat.models.tiny import tiny_clip
from fastmat.training.forward import encode_views


def by_hand(images, texts, scale: float, image_group: list[int], text_group: list[int]) -> float:
    """Mean over anchors of the mean over their positives of -log softmax; both directions, halved."""

    def one_way(anchors, others, anchor_group, other_group) -> float:
        total = 0.0
        for a, group in zip(anchors.tolist(), anchor_group, strict=True):
            logits = [scale * sum(x * y for x, y in zip(a, b, strict=True)) for b in others.tolist()]
            log_sum = math.log(sum(math.exp(logit) for logit in logits))
            own = [logit - log_sum for logit, other in zip(logits, other_group, strict=True) if other == group]
            total -= sum(own) / len(own)
        return total / len(anchors)

    return (one_way(images, texts, image_group, text_group) + one_way(texts, images, text_group, image_group)) / 2


def test_the_loss_of_an_augmented_batch_is_the_formula() -> None:
    """Three captions and three views per image, and two images of one group that share all positives."""
    torch.manual_seed(0)
    model = tiny_clip().double()
    batch = random_batch((1, 1, 1, 1))
    size = model.image_transform.size
    pool = CaptionPool(
        human=tuple((f"a red dog {i}", f"the cat sits {i}") for i in range(20)),
        generated=tuple((f"the hound number {i}", f"red runs {i}") for i in range(20)),
    )
    batch.group[3] = batch.group[1]  # N:1 on top: two images of the set that match one another's captions
    draws = SeededDraws(1)
    augmented = ImageViews(views=2)(CaptionDraw(pool=pool, number=3, generated=0.4)(batch, draws), draws)
    assert len(augmented) == 12 and len(augmented.texts) == 12 and size > 0
    augmented = augmented.replace(images=augmented.images.double())

    defence = FineTune()
    views = defence.perturb(model, augmented, draws)
    features = encode_views(model, model, views, augmented)
    (loss,) = defence.loss(features).values()

    images = torch.stack([model.encode_image(image[None]).features[0] for image in augmented.images])
    texts = torch.stack([model.encode_text(model.tokenize([text])).features[0] for text in augmented.texts])
    image_group = batch.group.tolist() * 3
    text_group = [group for group in batch.group.tolist() for _ in range(3)]
    scale = float(model.logit_scale.detach())
    expected = by_hand(images, texts, scale, image_group, text_group)
    assert abs(float(loss.detach()) - expected) < 1e-5 * expected
    # which the shared group of images 1 and 3 enters
    apart = by_hand(images, texts, scale, [0, 1, 2, 3] * 3, [i // 3 for i in range(12)])
    assert abs(apart - expected) > 1e-3
