"""ALBEF without recordings: against a plain restatement, from every official layout, and against bad files."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fastmat import build
from fastmat.errors import UserError
from fastmat.models.albef import Albef, load_albef
from fastmat.models.fusion_checkpoint import FusionCheckpoint, FusionSizes
from fastmat.models.protocol import FusionModel, TextState, TextTokens, fuses, has_embeddings, has_prefixes
from fastmat.models.tiny import tiny_clip
from fastmat.models.tiny_fusion import tiny_albef

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "runs", "red", "##s", "on", "snow"]
TINY = replace(tiny_albef().sizes, vocabulary=len(PIECES))
TEXTS = ["a dog", "dogs runs on red snow", "snow"]
State = dict[str, Tensor]


def official_shapes(sizes: FusionSizes, *, bert: str = "", copy: str = "") -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the encoders as the official code names them. bert: "bert." in a pre-training file; copy:
    "_m" for the momentum ones."""
    w, h, t, g = sizes.image_width, sizes.image_hidden, sizes.text_width, sizes.text_hidden
    vision = {
        "cls_token": (1, 1, w),
        "pos_embed": (1, 1 + (sizes.image_size // sizes.patch) ** 2, w),
        "patch_embed.proj.weight": (w, 3, sizes.patch, sizes.patch),
        "patch_embed.proj.bias": (w,),
        "norm.weight": (w,),
        "norm.bias": (w,),
    }
    for n in range(sizes.image_layers):
        linears = {"attn.qkv": (3 * w, w), "attn.proj": (w, w), "mlp.fc1": (h, w), "mlp.fc2": (w, h)}
        for name, shape in linears.items():
            vision |= {f"blocks.{n}.{name}.weight": shape, f"blocks.{n}.{name}.bias": shape[:1]}
        vision |= {f"blocks.{n}.norm{i}.{part}": (w,) for i in (1, 2) for part in ("weight", "bias")}
    text: dict[str, tuple[int, ...]] = {
        "embeddings.position_ids": (1, sizes.positions),
        "embeddings.word_embeddings.weight": (sizes.vocabulary, t),
        "embeddings.position_embeddings.weight": (sizes.positions, t),
        "embeddings.token_type_embeddings.weight": (2, t),
        "embeddings.LayerNorm.weight": (t,),
        "embeddings.LayerNorm.bias": (t,),
    }
    for n in range(sizes.text_layers + sizes.fusion_layers):
        blocks = {"attention": t, "crossattention": w} if n >= sizes.text_layers else {"attention": t}
        linears = {"intermediate.dense": (g, t), "output.dense": (t, g)}
        for block, source in blocks.items():
            linears |= {f"{block}.self.query": (t, t), f"{block}.output.dense": (t, t)}
            linears |= {f"{block}.self.{name}": (t, source) for name in ("key", "value")}
        for name, shape in linears.items():
            text |= {f"encoder.layer.{n}.{name}.weight": shape, f"encoder.layer.{n}.{name}.bias": shape[:1]}
        for block in ("", *(f"{block}." for block in blocks)):
            text |= {f"encoder.layer.{n}.{block}output.LayerNorm.{part}": (t,) for part in ("weight", "bias")}
    shapes = {f"visual_encoder{copy}.{key}": shape for key, shape in vision.items()}
    shapes |= {f"text_encoder{copy}.{bert}{key}": shape for key, shape in text.items()}
    for name, width in (("vision", w), ("text", t)):
        shapes |= {f"{name}_proj{copy}.weight": (sizes.embed_dim, width), f"{name}_proj{copy}.bias": (sizes.embed_dim,)}
    return shapes


def official_file(sizes: FusionSizes, *, pretraining: bool, queue: int = 8) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a whole file: `ALBEF.pth` (pretraining) or `flickr30k.pth`, `mscoco.pth`."""
    bert, t = "bert." if pretraining else "", sizes.text_width
    shapes = official_shapes(sizes, bert=bert) | official_shapes(sizes, bert=bert, copy="_m")
    shapes |= {"temp": (), "itm_head.weight": (2, t), "itm_head.bias": (2,), "queue_ptr": (1,)}
    shapes |= {"image_queue": (sizes.embed_dim, queue), "text_queue": (sizes.embed_dim, queue)}
    if not pretraining:
        return shapes | {"idx_queue": (1, queue)}
    for copy in ("", "_m"):
        head = f"text_encoder{copy}.cls.predictions."
        shapes |= {f"{head}bias": (sizes.vocabulary,), f"{head}decoder.bias": (sizes.vocabulary,)}
        shapes |= {f"{head}decoder.weight": (sizes.vocabulary, t), f"{head}transform.dense.weight": (t, t)}
        shapes |= {f"{head}transform.{name}": (t,) for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias")}
    return shapes


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in shapes.items()}
    return state | {"temp": torch.tensor(0.05)}


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    return str(tmp_path / "vocab.txt")


def load(path: Path, vocabulary: str, **settings: object) -> Albef:
    return load_albef(path, vocabulary=vocabulary, image_heads=2, text_heads=2, **settings).eval()


def plain(s: State, image: Tensor, ids: list[int]) -> dict[str, Tensor]:
    """One image [3, S, S] in [0, 1] and one unpadded text, on tensors of the official layout."""
    mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return centred / spread * s[f"{name}.weight"] + s[f"{name}.bias"]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = q.shape[1] // 2  # two heads
        heads = []
        for h in (slice(0, size), slice(size, None)):
            heads.append(torch.softmax(q[:, h] @ k[:, h].T / size**0.5, 1) @ v[:, h])
        return torch.cat(heads, 1)

    patches = []
    x = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    weight, bias = s["visual_encoder.patch_embed.proj.weight"], s["visual_encoder.patch_embed.proj.bias"]
    size = weight.shape[-1]
    for top in range(0, x.shape[1], size):
        for left in range(0, x.shape[2], size):
            patches.append((weight * x[:, top : top + size, left : left + size]).sum((1, 2, 3)) + bias)
    v = torch.stack([s["visual_encoder.cls_token"][0, 0], *patches]) + s["visual_encoder.pos_embed"][0]
    for n in range(TINY.image_layers):
        block = f"visual_encoder.blocks.{n}"
        v = v + linear(
            f"{block}.attn.proj", attend(*linear(f"{block}.attn.qkv", norm(f"{block}.norm1", v, 1e-6)).chunk(3, 1))
        )
        grown = linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", v, 1e-6))
        v = v + linear(f"{block}.mlp.fc2", grown * 0.5 * (1 + torch.erf(grown / 2**0.5)))
    v = norm("visual_encoder.norm", v, 1e-6)

    t = torch.stack([s["text_encoder.embeddings.word_embeddings.weight"][i] for i in ids])
    t = t + s["text_encoder.embeddings.position_embeddings.weight"][: len(ids)]
    t = norm(
        "text_encoder.embeddings.LayerNorm", t + s["text_encoder.embeddings.token_type_embeddings.weight"][0], 1e-12
    )
    found = {}
    for n in range(TINY.text_layers + TINY.fusion_layers):
        layer = f"text_encoder.encoder.layer.{n}"
        if n == TINY.text_layers:
            found["text"] = t
        for block in ("attention", "crossattention")[: 1 + (n >= TINY.text_layers)]:
            source = t if block == "attention" else v
            q, k, w = (
                linear(f"{layer}.{block}.self.{x}", y)
                for x, y in zip(("query", "key", "value"), (t, source, source), strict=True)
            )
            t = norm(
                f"{layer}.{block}.output.LayerNorm", t + linear(f"{layer}.{block}.output.dense", attend(q, k, w)), 1e-12
            )
        grown = linear(f"{layer}.intermediate.dense", t)
        grown = grown * 0.5 * (1 + torch.erf(grown / 2**0.5))
        t = norm(f"{layer}.output.LayerNorm", t + linear(f"{layer}.output.dense", grown), 1e-12)
    image_embed, text_embed = linear("vision_proj", v[0]), linear("text_proj", found["text"][0])
    return found | {
        "image": v,
        "image_embed": image_embed,
        "text_embed": text_embed,
        "fused": t,
        "itm": linear("itm_head", t[0]),
    }


@pytest.mark.parametrize("pretraining", [True, False])
def test_both_official_layouts_equal_the_plain_model(tmp_path, vocabulary: str, pretraining: bool) -> None:
    state = random_state(official_file(TINY, pretraining=pretraining))
    # What the official code saves beside the weights: plain values, and no code.
    torch.save(
        {"model": state, "optimizer": {"state": {}}, "config": {"image_res": 32}, "epoch": 9}, tmp_path / "a.pth"
    )
    model = load(tmp_path / "a.pth", vocabulary)
    assert isinstance(model, FusionModel) and model.sizes == TINY
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens = model.tokenize(TEXTS)
    with torch.no_grad():
        image, text, scale, _ = model(images, tokens)
        fused = model.fuse(image, text)
    assert scale.item() == pytest.approx(20)
    short = {key.replace("text_encoder.bert.", "text_encoder."): value for key, value in state.items()}
    for i, ids in enumerate([[2, 5, 6], [2, 6, 9, 7, 10, 8, 11], [2, 11]]):
        assert tokens.ids[i, : len(ids)].tolist() == ids and not tokens.mask[i, len(ids) :].any()
        want = plain(short, images[i], ids)
        for got, expected in (
            (image.tokens[i], want["image"]),
            (image.embeds[i], want["image_embed"]),
            (image.features[i], want["image_embed"] / want["image_embed"].norm()),
            (text.tokens[i, : len(ids)], want["text"]),
            (text.embeds[i], want["text_embed"]),
            (text.features[i], want["text_embed"] / want["text_embed"].norm()),
            (fused.tokens[i, : len(ids)], want["fused"]),
            (fused.itm_logits[i], want["itm"]),
        ):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_the_parts_of_a_file_are_told_apart() -> None:
    state = random_state(official_file(TINY, pretraining=True))
    parts = FusionCheckpoint.of(state, first=2)
    kept = len(parts.model) + len(parts.momentum) + len(parts.queues) + len(parts.pretraining)
    assert kept == len(state) - 2  # two position_ids
    assert set(parts.queues) == {"image_queue", "text_queue", "queue_ptr"}
    assert len(parts.pretraining) == 14 and all(".cls.predictions." in key for key in parts.pretraining)
    assert set(parts.momentum) == {key for key in parts.model if not key.startswith(("temp", "itm_head."))}
    name = "fusion.layers.1.crossattention.key.weight"
    assert torch.equal(
        parts.momentum[name], state["text_encoder_m.bert.encoder.layer.3.crossattention.self.key.weight"]
    )
    larger = parts.at(replace(TINY, image_size=48))
    assert larger.model["image_tower.pos_embed"].shape == larger.momentum["image_tower.pos_embed"].shape == (1, 37, 24)


@pytest.mark.parametrize("pretraining", [True, False])
def test_the_published_size_has_every_official_key_and_no_other(pretraining: bool) -> None:
    sizes = FusionSizes(image_size=256 if pretraining else 384)
    shapes = official_file(sizes, pretraining=pretraining, queue=65536)
    with torch.device("meta"):
        parts = FusionCheckpoint.of({key: torch.empty(shape) for key, shape in shapes.items()}, first=6)
        model = Albef(
            sizes=FusionSizes.of(parts.model, image_size=None, image_heads=12, text_heads=12, source="file"),
            tokenizer=tiny_albef().tokenizer,
            context_length=30,
        )
    assert model.sizes == sizes
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in parts.model.items()}

    def millions(*modules: torch.nn.Module) -> float:
        return sum(parameter.numel() for module in modules for parameter in module.parameters()) / 1e6

    # The paper's counts (section 3.1): 85.8 and 123.7 million, the latter with the pre-training head's 0.6.
    assert millions(model.image_tower) == pytest.approx(85.8, abs=0.3)
    assert millions(model.text_tower, model.fusion) == pytest.approx(123.7 - 0.62, abs=0.05)


def test_every_key_that_does_not_match_is_named(tmp_path, vocabulary: str) -> None:
    state = random_state(official_shapes(TINY) | {"temp": (), "itm_head.weight": (2, 16), "itm_head.bias": (2,)})
    strangers = {f"cls_head.{n}.weight": torch.zeros(1) for n in range(7)}
    gone = [key for key in state if key.startswith("visual_encoder.blocks.1.attn.")]
    broken = {key: value for key, value in state.items() if key not in gone} | strangers
    broken["itm_head.weight"] = torch.zeros(3, 16)
    save_file(broken, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="does not fit this model") as caught:
        load(tmp_path / "a.safetensors", vocabulary)
    for key in (*strangers, *(key.replace("visual_encoder", "image_tower") for key in gone), "itm_head.weight"):
        assert key in str(caught.value), key


def without(pattern: str) -> State:
    state = random_state(official_shapes(TINY) | {"temp": (), "itm_head.weight": (2, 16), "itm_head.bias": (2,)})
    return {key: value for key, value in state.items() if not re.search(pattern, key)}


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (lambda: {"logit_scale": torch.ones(())}, "no layer of a text encoder in it looks at an image"),
        (lambda: {k.replace(".layer.3.", ".layer.0."): v for k, v in without("layer.[012]").items()}, "as BLIP's"),
        (lambda: without("patch_embed"), "'image_tower.patch_embed.proj.weight' is missing"),
        (lambda: without("pos_embed") | {"visual_encoder.pos_embed": torch.zeros(1, 16, 24)}, "no square grid"),
        (lambda: without("blocks"), "'image_tower.blocks.0.mlp.fc1.weight' is missing"),
    ],
    ids=["clip", "blip", "no patches", "not square", "no blocks"],
)
def test_files_of_other_models(tmp_path, vocabulary: str, state, sentence: str) -> None:
    torch.save(state(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        load(tmp_path / "a.pth", vocabulary)
    assert "a.pth" in str(caught.value) and str(caught.value).count(". ") == 0


class Bomb:
    def __reduce__(self):
        return (open, ("/dev/null",))


def test_code_is_never_run(tmp_path, vocabulary: str) -> None:
    torch.save({"model": random_state(official_shapes(TINY)), "args": Bomb()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="carries code, which is never run"):
        load(tmp_path / "a.pth", vocabulary)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"image_size": 20}, "image_size must be a multiple of the patch size 8, got 20"),
        ({"image_size": 0}, "image_size must be a multiple"),
        ({"image_heads": 5}, "image_heads must divide the width 24, got 5"),
        ({"text_heads": 0}, "text_heads must divide the width 16, got 0"),
        ({"context_length": 33}, "context_length must be between 3 and the model's 32, got 33"),
        ({"vocabulary": "/nowhere/at/all"}, "no BERT tokenizer in '/nowhere/at/all'"),
    ],
)
def test_bad_settings(tmp_path, vocabulary: str, settings: dict, sentence: str) -> None:
    torch.save(without("nothing"), tmp_path / "a.pth")
    arguments = {"vocabulary": vocabulary, "image_heads": 2, "text_heads": 2, **settings}
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_albef(tmp_path / "a.pth", **arguments)


def test_bad_vocabularies(tmp_path, vocabulary: str) -> None:
    torch.save(without("nothing"), tmp_path / "a.pth")
    Path(vocabulary).write_text("\n".join([*PIECES, "cat"]) + "\n")
    with pytest.raises(UserError, match="has 13 pieces, the model 12"):
        load(tmp_path / "a.pth", vocabulary)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor vocab\.txt"):
        load(tmp_path / "a.pth", str(tmp_path / "empty"))


def test_separator_and_length(tmp_path, vocabulary: str) -> None:
    torch.save(without("nothing"), tmp_path / "a.pth")
    published, closed = load(tmp_path / "a.pth", vocabulary), load(tmp_path / "a.pth", vocabulary, append_sep=True)
    assert published.tokenize(["dogs runs"]).ids.tolist() == [[2, 6, 9, 7]]
    assert closed.tokenize(["dogs runs"]).ids.tolist() == [[2, 6, 9, 7, 3]]
    long = " ".join(["dog"] * 40)
    assert published.tokenize([long]).ids.tolist() == [[2, *[6] * 29]]
    assert closed.tokenize([long], max_length=5).ids.tolist() == [[2, 6, 6, 6, 3]]
    assert load(tmp_path / "a.pth", vocabulary, context_length=7).tokenize(["a"], pad=True).ids.shape == (1, 7)


def test_another_resolution_interpolates_positions_and_leaves_the_rest(tmp_path, vocabulary: str) -> None:
    torch.save(without("nothing"), tmp_path / "a.pth")
    small, large = load(tmp_path / "a.pth", vocabulary), load(tmp_path / "a.pth", vocabulary, image_size=48)
    assert (small.image_transform.size, large.image_transform.size) == (32, 48)
    a, b = small.state_dict(), large.state_dict()
    assert {key for key in a if a[key].shape != b[key].shape} == {"image_tower.pos_embed"}
    grid = a["image_tower.pos_embed"][0, 1:].T.view(1, 24, 4, 4)
    want = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False, antialias=False)
    torch.testing.assert_close(b["image_tower.pos_embed"][0, 1:].T.view(1, 24, 6, 6), want)
    assert torch.equal(a["image_tower.pos_embed"][:, 0], b["image_tower.pos_embed"][:, 0])
    images = torch.rand(2, 3, 32, 32)
    resized = F.interpolate(images, (48, 48), mode="bicubic", align_corners=False, antialias=True)
    assert torch.equal(large.encode_image(images).embeds, large.encode_image(resized).embeds)


def test_texts_share_the_keys_and_values_of_their_image() -> None:
    model = tiny_albef(seed=3).eval()
    text = model.encode_text(model.tokenize(["a b c", "d", "e f g h i", "j k"]))
    image = model.encode_image(torch.rand(2, 3, 32, 32))
    owner = torch.tensor([1, 0, 1, 1])
    with torch.no_grad():
        shared = model.fuse(image, text, owner)
        rows = model.fuse(type(image)(*(of[owner] for of in image)), text)
        torch.testing.assert_close(shared.tokens, rows.tokens, atol=1e-6, rtol=1e-6)
        alone = model.encode_text(model.tokenize(["d"]))
        one = model.fuse(type(image)(*(of[:1] for of in image)), alone)
    torch.testing.assert_close(shared.itm_logits[1:2], one.itm_logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(shared.tokens[1, :3], one.tokens[0], atol=1e-6, rtol=1e-6)  # padding changes nothing


def test_attention_maps_are_those_of_the_fused_state_and_in_the_graph() -> None:
    model = tiny_albef(seed=3).eval()
    text = model.encode_text(model.tokenize(["a b c", "d"]))
    image = model.encode_image(torch.rand(2, 3, 32, 32))
    plain, mapped = model.fuse(image, text), model.fuse(image, text, None, True)
    assert mapped.attention is not None and plain.attention is None
    assert [tuple(of.shape) for of in mapped.attention] == [(2, 2, 5, 17)] * 2
    torch.testing.assert_close(mapped.tokens, plain.tokens, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mapped.attention[0].sum(-1), torch.ones(2, 2, 5))
    gradients = torch.autograd.grad(mapped.itm_logits[:, 1].sum(), mapped.attention)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_training_mode_drops_and_eval_mode_does_not() -> None:
    model = tiny_albef(seed=3)
    image, text = model.encode_image(torch.rand(1, 3, 32, 32)), model.encode_text(model.tokenize(["a b c"]))
    assert not torch.equal(model.train().fuse(image, text).tokens, model.fuse(image, text).tokens)
    assert torch.equal(model.eval().fuse(image, text).tokens, model.fuse(image, text).tokens)


def test_a_shift_moves_the_embeddings_of_the_tokens() -> None:
    model = tiny_albef(seed=3).eval()
    tokens = model.tokenize(["a b", "c d"])
    words = model.token_embedding.weight
    difference = (words[tokens.ids[1]] - words[tokens.ids[0]])[None]
    moved = model.encode_text(TextTokens(tokens.ids[:1], tokens.mask[:1], difference))
    torch.testing.assert_close(moved.embeds, model.encode_text(tokens).embeds[1:])


def test_what_a_model_offers() -> None:
    clip, albef = tiny_clip(), tiny_albef()
    assert fuses(albef) and has_embeddings(albef) and not has_prefixes(albef)
    assert not fuses(clip) and has_prefixes(clip) and has_embeddings(clip)


def test_names_of_the_registry() -> None:
    model = build.build_model(build.parse({"name": "tiny_albef", "seed": 3}, build.MODELS, where="model"))
    assert isinstance(model, Albef) and not model.training
    build.parse({"name": "albef", "checkpoint": "x.pth", "image_size": 384}, build.MODELS, where="model")
    with pytest.raises(UserError, match="unknown key 'image_res'"):
        build.parse({"name": "albef", "image_res": 384}, build.MODELS, where="model")


def test_state_is_reusable() -> None:
    """Rows of a text state, in any order, with any image."""
    model = tiny_albef(seed=3).eval()
    text = model.encode_text(model.tokenize(["a b c", "d", "e f"]))
    image = model.encode_image(torch.rand(2, 3, 32, 32))
    whole = model.fuse(image, text, torch.tensor([0, 1, 0]))
    rows = TextState(*(of[[2, 1]] for of in text))
    torch.testing.assert_close(model.fuse(image, rows).itm_logits, whole.itm_logits[[2, 1]], atol=1e-6, rtol=1e-6)
