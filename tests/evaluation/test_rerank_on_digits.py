"""Two-stage retrieval on the built-in set: a small fusion model learns it from nothing, and its matching head, alone as
ALBEF ranks or with the cosine as BLIP does, puts the shortlist in a better order than contrast, clean and attacked on
contrast."""

from dataclasses import replace
from pathlib import Path

from fastmat.attacks.pgd import PGD
from fastmat.data.digits import digits_set
from fastmat.data.loader import TrainingBatches, evaluation_batches
from fastmat.defences.finetune import FineTune
from fastmat.defences.matching import Matching, MatchingSettings
from fastmat.evaluation.evaluate import encode_gallery, gallery_ranks
from fastmat.evaluation.metrics import recalls
from fastmat.evaluation.rerank import Rerank
from fastmat.models.small_fusion import SmallFusion, small_fusion
from fastmat.training.loop import train
from fastmat.training.settings import TrainSettings
from fastmat.types import ThreatModel

STEPS, RERANK_K, IMAGES = 700, 16, 80


def trained(out: Path) -> SmallFusion:
    """Embeddings so narrow that a cosine cannot tell all scenes apart, as it cannot on real photos."""
    own = digits_set("train")
    words = sorted({word for captions in own.captions for text in captions for word in text.split()})
    model = small_fusion(vocabulary=words, widths=(16, 32, 64), width=64, layers=1, embed_dim=2)
    matching = MatchingSettings(queue=0, ema_decay=None, negatives="online")
    defence = Matching(defence=FineTune(), model=model, settings=matching, seed=0)
    batches = TrainingBatches(own, model.image_transform, batch_size=32, captions_per_image=1, seed=0)
    told = TrainSettings(steps=STEPS, lr=1e-3, weight_decay=1e-2, warmup_steps=STEPS // 10, save_every=STEPS)
    train(model, defence, batches, settings=told, out=out, config={})
    return model.eval()


def test_reranking_beats_contrast_alone(tmp_path: Path) -> None:
    model = trained(tmp_path / "run")
    clean = list(evaluation_batches(digits_set("test").take(IMAGES), model.image_transform, batch_size=IMAGES))
    attack = PGD(threat=ThreatModel(eps=2 / 255), steps=10)  # ascends the contrastive loss
    attacked = [batch.replace(images=attack(model, batch).images) for batch in clean]
    for name, seen in (("clean", clean), ("attacked", attacked)):
        for plus_cosine in (False, True):
            gallery = encode_gallery(model, seen, rerank=Rerank(k=RERANK_K, plus_cosine=plus_cosine))
            by_cosine = recalls(gallery_ranks(replace(gallery, matching=None)))
            reranked = recalls(gallery_ranks(gallery))
            for metric in ("tr@1", "ir@1"):
                assert reranked[metric] > by_cosine[metric] + 5, (name, plus_cosine, metric, by_cosine, reranked)
        if name == "clean":
            assert by_cosine["ir@1"] > 8, "1.25 is chance: there is an order to better"
