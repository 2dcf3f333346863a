import base64
import io
from collections.abc import Callable

import pytest
import torch
from PIL import Image

from fastmat.attacks.pgd import PGD
from fastmat.evaluation import examples as module
from fastmat.evaluation.evaluate import clean_ranks, encode_gallery, gallery_context, run_attack
from fastmat.evaluation.examples import make_examples, pick_images, png
from fastmat.evaluation.metrics import Ranks
from fastmat.evaluation.results import Setting
from fastmat.models.dual_encoder import DualEncoder
from fastmat.types import Batch

SETTING = Setting(surrogate="a", victim="a", defence="mat", attack="pgd", dataset="d", split="test", seed=0)
IDS = tuple(f"photo {i}" for i in range(11))


def pixels(encoded: str) -> torch.Tensor:
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def test_examples_against_the_gallery(
    model: DualEncoder, data: Batch, split: Callable[[int], list[Batch]], pgd: PGD
) -> None:
    batches = split(4)
    attacked = list(run_attack(model, pgd, batches, gallery_context(encode_gallery(model, batches))))
    # The second caption of image 5 changes: it is the one to show.
    texts = list(attacked[1].pairs.texts)
    place = attacked[1].pairs.txt2img.tolist().index(1) + 1
    texts[place] = "a pink cup"
    object.__setattr__(attacked[1].pairs, "texts", tuple(texts))
    made = make_examples(model, batches, iter(attacked), images=[5, 0, 7], ids=IDS, setting=SETTING)
    assert [example.image for example in made] == ["photo 5", "photo 0", "photo 7"] and made[0].setting == SETTING
    assert (
        made[0].caption_after == "a pink cup"
        and made[0].caption_before == data.texts[data.txt2img.tolist().index(5) + 1]
    )
    assert made[1].caption_before == made[1].caption_after == data.texts[0]

    adversarial = torch.cat([part.pairs.images for part in attacked])
    for example, i in zip(made, [5, 0, 7], strict=True):
        assert torch.equal(pixels(example.clean), data.images[i].mul(255).round().byte().permute(1, 2, 0))
        assert torch.equal(pixels(example.adversarial), adversarial[i].mul(255).round().byte().permute(1, 2, 0))
        assert example.magnification == int(0.5 / float((adversarial[i] - data.images[i]).abs().max())) >= 15
        expected = 0.5 + example.magnification * (adversarial[i] - data.images[i])
        shown = pixels(example.difference).permute(2, 0, 1) / 255
        torch.testing.assert_close(shown, expected, atol=0.5 / 255 + 1e-5, rtol=0)

    for side, pairs in (("before", data), ("after", data.replace(images=adversarial))):
        if side == "after":
            pairs = pairs.replace(texts=sum((part.pairs.texts for part in attacked), ()))
        gallery, ranks = encode_gallery(model, [pairs]), clean_ranks(model, [pairs])
        for example, i in zip(made, [5, 0, 7], strict=True):
            order = (gallery.text_features @ gallery.image_features[i]).argsort(descending=True)[:5].tolist()
            shown = getattr(example, f"texts_{side}")
            assert [item.text for item in shown] == [pairs.texts[t] for t in order]
            assert [item.correct for item in shown] == [bool(data.text_group[t] == data.group[i]) for t in order]
            assert getattr(example, f"image_rank_{side}") == ranks.tr[i] + 1
            caption = pairs.texts.index(getattr(example, f"caption_{side}"))
            order = (gallery.image_features @ gallery.text_features[caption]).argsort(descending=True)[:5].tolist()
            shown = getattr(example, f"images_{side}")
            assert [item.png for item in shown] == [png(pairs.images[j]) for j in order]
            assert [item.correct for item in shown] == [bool(data.group[j] == data.text_group[caption]) for j in order]
            assert getattr(example, f"caption_rank_{side}") == ranks.ir[caption] + 1


def test_pick_prefers_images_right_when_clean_and_is_seeded() -> None:
    tr = torch.tensor([0, 3, 0, 1, 0, 2, 0, 9])
    ranks = Ranks(tr=tr, ir=tr, txt2img=torch.arange(8))
    picked = pick_images(ranks, count=3, seed=1)
    assert len(set(picked)) == 3 and set(picked) < {0, 2, 4, 6} and picked == pick_images(ranks, count=3, seed=1)
    assert {tuple(pick_images(ranks, count=3, seed=seed)) for seed in range(9)} != {tuple(picked)}
    assert set(pick_images(ranks, count=6, seed=1)[:4]) == {0, 2, 4, 6}
    assert sorted(pick_images(ranks, count=50, seed=1)) == list(range(8))


@pytest.mark.parametrize("size", [(300, 200), (20, 20), (1, 500)])
def test_thumbnails_are_small_and_keep_their_shape(size: tuple[int, int]) -> None:
    small = module.thumbnails(torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)))
    assert small.dtype == torch.uint8 and max(small.shape[-2:]) == min(96, max(size))
    assert small.shape[-2] == max(1, round(size[0] * min(1, 96 / max(size))))
