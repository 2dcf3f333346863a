"""Visual entailment: the official layout of checkpoints, the classes, the attack on their logits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from annotated import write_snli_ve
from batches import random_batch
from torch import Tensor

from fastmat.attacks.apgd import APGD
from fastmat.attacks.base import Attack, context_of
from fastmat.attacks.entailment import KLEntailment
from fastmat.attacks.objectives import KLFromClean
from fastmat.attacks.pgd import PGD
from fastmat.data.loader import evaluation_batches
from fastmat.errors import UserError
from fastmat.models.albef import Albef, load_albef
from fastmat.models.albef_ve import load_albef_ve
from fastmat.models.protocol import EntailmentModel, entails
from fastmat.models.tiny_fusion import tiny_albef, tiny_albef_ve
from fastmat.tasks.entailment import Entailment, classes
from fastmat.tasks.uncontrasted import check_surrogate
from fastmat.types import Batch, ThreatModel

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "runs", "red", "##s", "on", "snow"]
TINY = replace(tiny_albef().sizes, vocabulary=len(PIECES))
THREAT = ThreatModel(eps=8 / 255)
# Ours to the official names, of one layer of BERT.
LAYER = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.merge": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "feed_forward.grow": "intermediate.dense",
    "feed_forward.merge": "output.dense",
    "feed_forward.norm": "output.LayerNorm",
}


def official(model: Albef, *, copy: str = "") -> dict[str, Tensor]:
    """The encoders of a model as the official code names them. copy: "_m" for momentum copies."""
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith("image_tower."):
            state[key.replace("image_tower.", f"visual_encoder{copy}.")] = value
        elif key.startswith("text_tower."):
            state[key.replace("text_tower.", f"text_encoder{copy}.")] = value
        elif key.startswith("fusion.layers."):
            number, block, part, *rest = key.removeprefix("fusion.layers.").split(".")
            named = LAYER[f"{block.removeprefix('cross')}.{part}"]
            named = f"cross{named}" if block.startswith("cross") else named
            place = int(number) + model.sizes.text_layers
            state[f"text_encoder{copy}.encoder.layer.{place}.{named}.{'.'.join(rest)}"] = value
    return state


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Albef, dict[str, Tensor]]:
    """What the official script saves after fine-tuning: {"model": ...} with momentum copies; the encoders; the head."""
    albef = Albef(sizes=TINY, tokenizer=tiny_albef().tokenizer, context_length=8).eval()
    width = TINY.text_width
    head = {
        "0.weight": torch.randn(width, width),
        "0.bias": torch.randn(width),
        "2.weight": torch.randn(3, width),
        "2.bias": torch.randn(3),
    }
    state = {**official(albef), **{f"cls_head.{key}": value for key, value in head.items()}}
    state |= official(tiny_copy(), copy="_m") | {f"cls_head_m.{key}": value + 1 for key, value in head.items()}
    assert "text_encoder.encoder.layer.3.crossattention.self.key.weight" in state
    torch.save({"model": state, "epoch": 4}, tmp_path / "VE.pth")
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    return tmp_path / "VE.pth", albef, head


def tiny_copy() -> Albef:
    return Albef(sizes=TINY, tokenizer=tiny_albef().tokenizer, context_length=8)


def load(file: Path, **settings: object) -> Albef:
    vocabulary = str(file.parent / "vocab.txt")
    return load_albef_ve(file, vocabulary=vocabulary, image_heads=2, text_heads=2, context_length=16, **settings).eval()


def test_an_official_checkpoint_and_its_classes(checkpoint: tuple[Path, Albef, dict[str, Tensor]]) -> None:
    file, albef, head = checkpoint
    model = load(file)
    assert entails(model) and isinstance(model, EntailmentModel) and not entails(tiny_albef())
    batch = random_batch(size=32).replace(
        texts=("a dog", "dogs runs", "red snow", "a", "snow on a dog", "dog", "a a", "on")
    )
    image, text = model.encode_image(batch.images), model.encode_text(model.tokenize(batch.texts))
    fused = albef.fuse(albef.encode_image(batch.images), albef.encode_text(model.tokenize(batch.texts)), batch.txt2img)
    torch.testing.assert_close(model.fuse(image, text, batch.txt2img).tokens, fused.tokens)
    hidden = (fused.tokens[:, 0] @ head["0.weight"].T + head["0.bias"]).clamp(min=0)
    logits = hidden @ head["2.weight"].T + head["2.bias"]
    assert classes(model, batch).tolist() == logits.argmax(1).tolist()
    assert load(file, image_size=48).encode_image(batch.images).tokens.shape[1] == 37


def test_checkpoints_of_other_models(checkpoint: tuple[Path, Albef, dict[str, Tensor]]) -> None:
    file = checkpoint[0]
    vocabulary = str(file.parent / "vocab.txt")
    whole = torch.load(file)["model"]
    torch.save({key: value for key, value in whole.items() if not key.startswith("cls_head")}, file)
    with pytest.raises(UserError, match=r"no checkpoint for visual entailment: it has no 'cls_head\.\*'"):
        load(file)
    torch.save({key: value for key, value in whole.items() if key != "cls_head.2.bias"}, file)
    with pytest.raises(UserError, match=r"1 missing \(entailment_head\.2\.bias\)"):
        load(file)
    torch.save(whole, file)
    with pytest.raises(UserError, match="no whole checkpoint"):
        load_albef(file, vocabulary=vocabulary, image_heads=2, text_heads=2)


def test_accuracy_from_both_formats(tmp_path: Path) -> None:
    arguments = write_snli_ve(tmp_path)
    model, found = loud_ve(), []
    for file in (arguments["annotations"], tmp_path / "ve_test.json"):
        task = Entailment(annotations=Path(file), images=Path(arguments["images"]))
        assert [label.item() for label in task.label] == [2, 1, 0] * 3  # the undecided pair is not judged
        batches = evaluation_batches(task.data, model.image_transform, batch_size=4)
        if not found:  # no class shall win everywhere
            model.entailment_head[2].bias.data -= torch.cat([logits(model, batch) for batch in batches]).mean(0)
        judged = task.judge(model, batches)
        said = ["contradiction", "neutral", "entailment"]
        expected = [said[i] for batch in batches for i in classes(model, batch).tolist()]
        assert list(judged.said) == expected and len(set(expected)) > 1
        assert judged.right is not None
        assert judged.right.tolist() == [a == b for a, b in zip(expected, task.wanted, strict=True)]
        found.append(judged.said)
    assert found[0] == found[1]


def logits(model: Albef, batch: Batch) -> Tensor:
    image, text = model.encode_image(batch.images), model.encode_text(model.tokenize(batch.texts))
    found: Tensor = model.entailment_head(model.fuse(image, text, batch.txt2img).tokens[:, 0]).detach()
    return found


def test_the_objective_and_what_ascends_it() -> None:
    model, batch = loud_ve(), random_batch()
    context = context_of(model, batch)
    value = KLEntailment().bind(model, batch, context)
    text = model.encode_text(model.tokenize(batch.texts))

    def probabilities(images: Tensor) -> Tensor:
        fused = model.fuse(model.encode_image(images), text, batch.txt2img).tokens[:, 0]
        return model.entailment_head(fused).softmax(1)

    moved = (batch.images + 0.05).clamp(0, 1)
    clean, other = probabilities(batch.images), probabilities(moved)
    by_text = (clean * (clean.log() - other.log())).sum(1)
    expected = torch.stack([by_text[batch.txt2img == i].mean() for i in range(len(batch))])
    torch.testing.assert_close(value(model.encode_image(moved)), expected, rtol=1e-4, atol=1e-6)
    for attack in (
        PGD(threat=THREAT, objective=KLEntailment()),
        APGD(threat=THREAT, objective=KLEntailment(), steps=8),
    ):
        result = attack(model, batch)
        assert bool(
            (value(model.encode_image(result.images)) > 10 * value(model.encode_image(batch.images)).abs()).all()
        )


def loud_ve() -> Albef:
    model = tiny_albef_ve().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def test_attacks_that_compare_images_with_texts_are_refused() -> None:
    model = tiny_albef_ve()
    fine: list[Attack] = [PGD(threat=THREAT, objective=KLFromClean()), PGD(threat=THREAT, objective=KLEntailment())]
    for attack in fine:
        check_surrogate(attack, model, label="a")
    with pytest.raises(UserError, match=r"attacks\.a: a model for entailment has no features .*: use co_attack or sep"):
        check_surrogate(PGD(threat=THREAT), model, label="a")
    check_surrogate(PGD(threat=THREAT), tiny_albef(), label="a")
    with pytest.raises(UserError, match="Albef has no head that tells entailment"):
        KLEntailment().bind(tiny_albef(), random_batch(), context_of(tiny_albef(), random_batch()))
