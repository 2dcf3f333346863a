import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.attacks.pgd import PGD
from fastmat.errors import UserError
from fastmat.evaluation.evaluate import (
    Attacked,
    clean_ranks,
    clean_row,
    encode_gallery,
    evaluate,
    gallery_context,
    gallery_ranks,
    run_attack,
)
from fastmat.evaluation.metrics import attack_success_rate, recall_at
from fastmat.evaluation.results import Setting, Threat
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.protocol import VisionLanguageModel
from fastmat.models.tiny import tiny_clip
from fastmat.types import AttackContext, Batch, ThreatModel

Split = Callable[[int], list[Batch]]
SETTING = Setting(surrogate="a", victim="b", defence="none", dataset="d", split="test", seed=3)


class Recolour(Attack):
    """Text only: the colour of every caption becomes pink."""

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        return batch.images, tuple(" ".join(["a", "pink", *text.split(" ")[2:]]) for text in batch.texts)


def attack_all(model: DualEncoder, attack: Attack, batches: list[Batch]) -> list[Attacked]:
    return list(run_attack(model, attack, batches, gallery_context(encode_gallery(model, batches))))


def test_gallery_does_not_depend_on_the_batch_size(model: DualEncoder, data: Batch, split: Split) -> None:
    whole = encode_gallery(model, [data])
    for size in (1, 4, 11):
        parts = encode_gallery(model, split(size))
        for name, value in vars(whole).items():
            torch.testing.assert_close(getattr(parts, name), value, atol=1e-6, rtol=0)
    assert torch.equal(whole.txt2img, data.txt2img) and torch.equal(whole.text_group, data.text_group)
    assert whole.image_features.dtype == torch.float32


def test_ranks_against_sorting_every_query(model: DualEncoder, data: Batch, split: Split) -> None:
    gallery = encode_gallery(model, split(4))
    ranks = gallery_ranks(gallery)
    scores = gallery.image_features @ gallery.text_features.T
    for rows, found, own, other in (
        (scores, ranks.tr, data.group, data.text_group),
        (scores.T, ranks.ir, data.text_group, data.group),
    ):
        for q, row in enumerate(rows):
            order = row.argsort(descending=True).tolist()
            assert found[q] == min(order.index(g) for g in range(len(other)) if other[g] == own[q])


@pytest.mark.parametrize("attack_name", ["pgd", "recolour"])
def test_splitting_the_data_never_changes_an_attack(
    model: DualEncoder, split: Split, pgd: PGD, attack_name: str
) -> None:
    attack = pgd if attack_name == "pgd" else Recolour(threat=ThreatModel())
    whole, parts = attack_all(model, attack, split(11))[0], attack_all(model, attack, split(3))
    images = torch.cat([part.pairs.images for part in parts])
    # A gradient next to zero may change sign with the summation order inside a convolution.
    assert ((images - whole.pairs.images).abs() > 1e-6).float().mean() < 1e-3
    assert sum((part.pairs.texts for part in parts), ()) == whole.pairs.texts
    assert torch.equal(torch.cat([part.pairs.index for part in parts]), whole.pairs.index)


def test_attack_keeps_clean_pairs(model: DualEncoder, split: Split, pgd: PGD) -> None:
    batches = split(4)
    attacked = list(run_attack(model, pgd, batches, gallery_context(encode_gallery(model, batches))))
    assert [len(part.pairs) for part in attacked] == [4, 4, 3]
    for part, batch in zip(attacked, batches, strict=True):
        assert part.sources == part.pairs.texts == batch.texts
        distance = (part.pairs.images - batch.images).abs().flatten(1).amax(1)
        assert torch.equal(part.distance, distance) and (distance > 0).all() and (distance <= 8 / 255 + 1e-6).all()
        assert part.seconds > 0 and not part.words_changed.any()


def test_row_of_an_attack(model: DualEncoder, split: Split, pgd: PGD) -> None:
    batches = split(4)
    clean = clean_ranks(model, batches)
    attacked = attack_all(model, pgd, batches)
    row = evaluate(model, attacked, clean=clean, setting=SETTING, resamples=50)
    after = clean_ranks(model, [part.pairs for part in attacked])
    for k in (1, 5, 10):
        assert row.value(f"tr@{k}") == recall_at(after.tr, k) and row.value(f"ir@{k}") == recall_at(after.ir, k)
        assert row.value(f"asr_tr@{k}") == attack_success_rate(clean.tr, after.tr, k)
        assert row.value(f"asr_ir@{k}") == attack_success_rate(clean.ir, after.ir, k)
    assert (row.n_images, row.n_captions) == (11, len(clean.ir))
    assert row.max_distance == max(float(part.distance.max()) for part in attacked)
    assert row.seconds == pytest.approx(sum(part.seconds for part in attacked))
    assert row.pairs_per_s == pytest.approx(row.n_captions / row.seconds)
    assert set(row.ci) <= {f"{a}{b}@{k}" for a in ("", "asr_") for b in ("tr", "ir") for k in (1, 5, 10)}
    assert row.ci["tr@1"][0] <= row.tr_1 <= row.ci["tr@1"][1]


def test_attack_on_texts_leaves_images_and_counts_words(model: DualEncoder, split: Split) -> None:
    attacked = attack_all(model, Recolour(threat=ThreatModel(eps=0.0)), split(4))
    row = evaluate(model, attacked, clean=clean_ranks(model, split(4)), setting=SETTING, resamples=10)
    assert row.max_distance == 0 and row.max_words_changed == 1
    assert all("pink" in text for part in attacked for text in part.pairs.texts)
    assert all(torch.equal(part.pairs.images, b.images) for part, b in zip(attacked, split(4), strict=True))


def test_transfer_is_judged_by_the_victims_own_clean_ranks(model: DualEncoder, split: Split, pgd: PGD) -> None:
    victim = tiny_clip(image_size=64, seed=1)  # another resolution: resizes inside
    attacked = attack_all(model, pgd, split(11))
    clean = clean_ranks(victim, split(11))
    row = evaluate(victim, attacked, clean=clean, setting=SETTING, resamples=10)
    after = clean_ranks(victim, [attacked[0].pairs])
    assert row.value("asr_ir@5") == attack_success_rate(clean.ir, after.ir, 5)
    assert not torch.equal(clean.ir, clean_ranks(model, split(11)).ir)


def test_clean_row(model: DualEncoder, data: Batch) -> None:
    clean = clean_ranks(model, [data])
    row = clean_row(clean, setting=SETTING, resamples=10)
    assert row.tr_5 == recall_at(clean.tr, 5)
    assert row.asr_tr_1 is None and row.seconds is None and row.threat == Threat(eps=0, max_words=0)
    assert set(row.ci) == {f"{way}@{k}" for way in ("tr", "ir") for k in (1, 5, 10)}


def test_evaluation_leaves_no_trace(model: DualEncoder, split: Split, pgd: PGD) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    evaluate(model, attack_all(model, pgd, split(4)), clean=clean_ranks(model, split(4)), setting=SETTING, resamples=5)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_nothing_to_evaluate(model: DualEncoder) -> None:
    with pytest.raises(UserError, match="no images or no captions"):
        encode_gallery(model, [])


def test_features_that_are_not_finite_are_refused(model: DualEncoder, data: Batch) -> None:
    images = data.images.clone()
    images[3] = torch.nan
    with pytest.raises(UserError, match=r"NaN or infinite features for image 3"):
        encode_gallery(model, [data.replace(images=images)])


def test_attacked_data_must_be_the_clean_data(model: DualEncoder, split: Split, pgd: PGD, data: Batch) -> None:
    part = attack_all(model, pgd, split(11))[0]
    short = dataclasses.replace(part, pairs=part.pairs.rows(0, 5))
    with pytest.raises(UserError, match=r"5 images.*\(11 images"):
        evaluate(model, [short], clean=clean_ranks(model, [data]), setting=SETTING)
