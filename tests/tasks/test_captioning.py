"""The captioner, its loss, and its scores against the published formulas, written out."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from annotated import write_coco_captions
from batches import random_batch
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from tiny_generators import save_captioner
from transformers import BlipForImageTextRetrieval, BlipProcessor

from fastmat.attacks.apgd import APGD
from fastmat.attacks.caption_loss import CaptionLoss
from fastmat.attacks.objectives import KLFromClean
from fastmat.attacks.pgd import PGD
from fastmat.errors import UserError
from fastmat.models.blip_captioner import BlipCaptioner, load_blip_captioner
from fastmat.models.protocol import CaptioningModel, captions_images
from fastmat.models.tiny_fusion import tiny_blip
from fastmat.tasks import caption_scores
from fastmat.tasks.base import estimates
from fastmat.tasks.caption_scores import caption_metrics, words
from fastmat.tasks.captioning import Captioning
from fastmat.tasks.uncontrasted import check_surrogate, no_context
from fastmat.types import ThreatModel

SAID = ["a red dog runs on the snow", "the black cat sits", "a man with a ball in a park", "a dog"]
REFERENCES = [
    ["A red dog runs in the snow.", "The dog runs on snow!"],
    ["the black cat sits on a mat", "a black cat sits", "cat"],
    ["a man plays with the ball in a park", "a man's ball, in a park"],
    ["a small dog sits", "the dog"],
]
THREAT = ThreatModel(eps=8 / 255)


def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    split = words(text).split()
    return Counter(tuple(split[i : i + n]) for i in range(len(split) - n + 1))


def plain_cider(said: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D of every picture (Vedantam et al., CVPR 2015, section 4 and 5)."""
    scores = []
    for caption, own in zip(said, references, strict=True):
        total = 0.0
        for n in range(1, 5):
            seen = Counter(gram for texts in references for gram in {g for text in texts for g in grams(text, n)})

            def weighted(text: str, n: int = n, seen: Counter[tuple[str, ...]] = seen) -> dict[tuple[str, ...], float]:
                rarity = {g: math.log(len(references)) - math.log(max(1, seen[g])) for g in grams(text, n)}
                return {g: count * rarity[g] for g, count in grams(text, n).items()}

            h = weighted(caption)
            for reference in own:
                r = weighted(reference)
                common = sum(min(h[g], r[g]) * r[g] for g in h if g in r)
                norm = math.sqrt(sum(v * v for v in h.values())) * math.sqrt(sum(v * v for v in r.values()))
                apart = sum(grams(caption, 2).values()) - sum(grams(reference, 2).values())
                total += (common / norm if norm else 0.0) * math.exp(-(apart**2) / (2 * 6.0**2)) / len(own)
        scores.append(10 * total / 4)
    return scores


def plain_bleu(said: list[str], references: list[list[str]], n: int) -> float:
    """BLEU of a corpus (Papineni et al., ACL 2002)."""
    product, length, closest = 1.0, 0, 0
    for k in range(1, n + 1):
        right = guessed = 0
        for caption, own in zip(said, references, strict=True):
            most: Counter[tuple[str, ...]] = Counter()
            for reference in own:
                most |= grams(reference, k)
            right += sum((grams(caption, k) & most).values())
            guessed += sum(grams(caption, k).values())
        product *= right / guessed
    for caption, own in zip(said, references, strict=True):
        length += len(words(caption).split())
        lengths = [len(words(reference).split()) for reference in own]
        closest += min(lengths, key=lambda other: (abs(other - len(words(caption).split())), other))
    return product ** (1 / n) * min(1.0, math.exp(1 - closest / length))


def test_scores_are_the_published_ones() -> None:
    found = caption_metrics(SAID, REFERENCES)
    values, intervals = estimates(found, torch.arange(4), seed=0, resamples=200)
    assert values["cider"] == pytest.approx(100 * sum(plain_cider(SAID, REFERENCES)) / 4)
    for n in range(1, 5):
        assert values[f"bleu{n}"] == pytest.approx(100 * plain_bleu(SAID, REFERENCES, n), rel=1e-6)
        low, high = intervals[f"bleu{n}"]
        assert low < values[f"bleu{n}"] < high
    # And what the library itself gives for the whole set, also where captions are short or empty.
    for said in (SAID, ["", "a", "a man with a ball in a park", "dog"]):
        own = {i: [words(text) for text in texts] for i, texts in enumerate(REFERENCES)}
        captions = {i: [words(text)] for i, text in enumerate(said)}
        values, _ = estimates(caption_metrics(said, REFERENCES), torch.arange(4), seed=0, resamples=2)
        bleu = Bleu(4).compute_score(own, captions, verbose=0)[0]
        assert [values[f"bleu{n}"] for n in range(1, 5)] == pytest.approx([100 * score for score in bleu])
        assert values["cider"] == pytest.approx(100 * Cider().compute_score(own, captions)[0])


def test_an_interval_is_that_of_resampled_pictures() -> None:
    metrics, chosen = caption_metrics(SAID, REFERENCES), [0, 0, 2, 3]
    weights = torch.tensor([2.0, 0, 1, 1], dtype=torch.float64)
    for n in range(1, 5):
        metric = metrics[f"bleu{n}"]
        expected = plain_bleu([SAID[i] for i in chosen], [REFERENCES[i] for i in chosen], n)
        assert float(metric.value(weights @ metric.sums)) == pytest.approx(100 * expected, rel=1e-6)


def test_words() -> None:
    assert (
        words("Two  'well-fed' dogs \u2013 can't they? It's 5 p.m. ...") == "two well-fed dogs ca n't they it 's 5 p m"
    )


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(caption_scores, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pycocoevalcap, which is not installed: pip install 'fastmat-vlm\[tasks\]'"):
        Captioning(annotations=tmp_path / "x.json", images=tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("models") / "captioner")


@pytest.fixture
def captioner(folder: Path) -> BlipCaptioner:
    return load_blip_captioner(str(folder), prompt="a red ", max_length=12, min_length=4)


def test_it_says_what_transformers_says(captioner: BlipCaptioner, folder: Path) -> None:
    assert captions_images(captioner) and isinstance(captioner, CaptioningModel) and not captions_images(tiny_blip())
    pixels = torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = BlipProcessor.from_pretrained(folder)
    pictures = [Image.fromarray(picture.numpy()) for picture in pixels]
    inputs = processor(images=pictures, text=["a red"] * 3, return_tensors="pt")
    ids = captioner.blip.generate(**inputs, num_beams=3, max_length=12, min_length=4)
    expected = [text.removeprefix("a red").strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    expected = [text.replace("[DEC]", "").replace("a red", "", 1).strip() for text in expected]
    said = captioner.generate(pixels.permute(0, 3, 1, 2) / 255)
    assert said == expected and len(set(said)) > 1


def test_the_loss_is_that_of_transformers(captioner: BlipCaptioner) -> None:
    batch = random_batch((2, 1, 1))
    texts = ("a dog runs in the snow", "the cat", "a black dog", "ball")
    captioner.blip.text_decoder.label_smoothing = 0.0
    expected = []
    for image, text in zip(batch.txt2img.tolist(), texts, strict=True):
        ids = captioner.tokenize([text]).ids
        labels = ids.clone()
        labels[:, :3] = -100  # [DEC] a red
        pixels = captioner.pixels(batch.images[image : image + 1])
        expected.append(captioner.blip(pixel_values=pixels, input_ids=ids, labels=labels).loss)
    state = captioner.encode_image(batch.images)
    found = captioner.caption_losses(state, captioner.tokenize(texts), batch.txt2img)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    value = CaptionLoss().bind(captioner, batch.replace(texts=texts), no_context("cpu"))(state)
    torch.testing.assert_close(value, torch.stack([(found[0] + found[1]) / 2, found[2], found[3]]))


def test_attacks_on_the_loss(captioner: BlipCaptioner) -> None:
    batch = random_batch((2, 1, 1))
    value = CaptionLoss().bind(captioner, batch, no_context("cpu"))
    clean = value(captioner.encode_image(batch.images))
    for attack in (PGD(threat=THREAT, objective=CaptionLoss()), APGD(threat=THREAT, objective=CaptionLoss(), steps=10)):
        result = attack(captioner, batch, no_context("cpu"))
        assert float(result.distance.max()) <= 8 / 255 + 1e-6
        assert bool((value(captioner.encode_image(result.images)) > clean).all())
    check_surrogate(PGD(threat=THREAT, objective=KLFromClean()), captioner, label="a")
    with pytest.raises(UserError, match=r"attacks\.a: a model for captions has no features .*caption_loss"):
        check_surrogate(PGD(threat=THREAT), captioner, label="a")
    with pytest.raises(UserError, match="a captioner encodes no text that stands alone"):
        PGD(threat=THREAT)(captioner, batch)


def test_folders_that_hold_no_captioner(folder: Path, tmp_path: Path, captioner: BlipCaptioner) -> None:
    with pytest.raises(UserError, match="path: no BLIP captioner in"):
        load_blip_captioner(str(tmp_path))
    BlipForImageTextRetrieval(captioner.blip.config).save_pretrained(tmp_path / "retrieval")
    with pytest.raises(UserError, match=r"is no BLIP captioner: .* weights are missing, such as text_decoder"):
        load_blip_captioner(str(tmp_path / "retrieval"))
    with pytest.raises(UserError, match="0 <= min_length <= max_length <= 64, got 3, 5 and 4"):
        load_blip_captioner(str(folder), max_length=4)
    with pytest.raises(UserError, match="max_length must exceed the 5 tokens of the prompt, got 5"):
        load_blip_captioner(str(folder), prompt="a a a a", max_length=5)


def official_file(captioner: BlipCaptioner, file: Path) -> dict[str, torch.Tensor]:
    """The captioner's weights as the official code names and saves them, and its vocabulary beside."""
    names = {
        "vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
        "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
        "vision_model.embeddings.patch_embedding": "visual_encoder.patch_embed.proj",
        "vision_model.post_layernorm": "visual_encoder.norm",
        "vision_model.encoder.layers": "visual_encoder.blocks",
        "layer_norm": "norm",
        "self_attn.projection": "attn.proj",
        "self_attn.qkv": "attn.qkv",
    }
    state = {}
    for key, value in captioner.blip.state_dict().items():
        for theirs, official in names.items():
            key = key.replace(theirs, official) if not key.startswith("text_decoder") else key
        state[key] = value.clone()
    del state["text_decoder.cls.predictions.decoder.bias"]
    state["text_decoder.bert.embeddings.position_ids"] = torch.arange(64)[None]
    torch.save({"model": state}, file)
    pieces = sorted(captioner.bert.get_vocab().items(), key=lambda item: item[1])
    (file.parent / "vocab.txt").write_text("\n".join(piece for piece, _ in pieces[:-2]) + "\n")
    return state


def test_an_official_checkpoint(folder: Path, tmp_path: Path, captioner: BlipCaptioner) -> None:
    file = tmp_path / "caption.pth"
    captioner.blip.vision_model.post_layernorm.eps = 1e-6
    for layer in captioner.blip.vision_model.encoder.layers:
        layer.layer_norm1.eps = layer.layer_norm2.eps = 1e-6
    state = official_file(captioner, file)
    common = {"vocabulary": str(tmp_path / "vocab.txt"), "image_heads": 2, "text_heads": 2}
    loaded = load_blip_captioner(checkpoint=file, prompt="a red ", **common)
    assert loaded.start == [len(captioner.bert) - 2, *captioner.start[1:]]  # [DEC] is the last but one, before [ENC]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = loaded.tokenize(["a red dog", "the cat"])
    for model in (loaded, captioner):
        state_of = model.encode_image(images)
        torch.testing.assert_close(state_of.tokens, captioner.encode_image(images).tokens)
        losses = model.caption_losses(state_of, tokens, torch.arange(2))
        torch.testing.assert_close(losses, captioner.caption_losses(state_of, tokens, torch.arange(2)))
    assert load_blip_captioner(checkpoint=file, image_size=64, **common).encode_image(images).tokens.shape[1] == 17
    for key, said in (
        ("text_decoder.cls.predictions.bias", r"2 missing \(text_decoder\.cls"),
        ("visual_encoder.pos_embed", "is no captioner of BLIP: 'visual_encoder.pos_embed' is missing"),
        ("text_decoder.bert.embeddings.word_embeddings.weight", "is no captioner of BLIP: 'text_decoder"),
    ):
        torch.save({name: value for name, value in state.items() if name != key}, file)
        with pytest.raises(UserError, match=said):
            load_blip_captioner(checkpoint=file, **common)
    with pytest.raises(UserError, match=r"name either path, .* or checkpoint"):
        load_blip_captioner(str(folder), checkpoint=file)


def test_references_are_those_of_the_data(tmp_path: Path, captioner: BlipCaptioner) -> None:
    arguments = write_coco_captions(tmp_path)
    task = Captioning(annotations=Path(arguments["annotations"]), images=Path(arguments["images"]))
    batch = random_batch((2, 2, 2, 2, 2)).replace(texts=("other words",) * 10)
    judged = task.judge(captioner, [batch])
    expected = plain_cider(list(judged.said), [list(texts) for texts in task.data.captions])
    values, _ = estimates(judged.metrics, task.picture, seed=0, resamples=2)
    assert values["cider"] == pytest.approx(100 * sum(expected) / 5)
