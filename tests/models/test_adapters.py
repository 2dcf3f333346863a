"""Low-rank adapters: same map before, W + B A alpha / rank after, plain weights out, and nothing that is not heard."""

import copy
import json
import sys

import open_clip
import pytest
import torch
from safetensors import safe_open

from fastmat.errors import UserError
from fastmat.models.adapters import AdapterSettings, add_adapters, merge_file, merged
from fastmat.models.open_clip import load_open_clip
from fastmat.models.tiny import tiny_clip
from fastmat.models.weights import load_weights, save_weights

peft = pytest.importorskip("peft")
SMALL = ("linear1", "linear2", "image_projection", "blocks.0")
TEXTS = ["a dog runs", "two cats sit near a tree"]


@pytest.fixture(scope="module")
def open_clip_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
            "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        },
        "preprocess_cfg": {},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_weights(clip, folder / "open_clip_model.safetensors")
    return load_open_clip(str(folder)).eval()


def small_model(kind, open_clip_model):
    return (tiny_clip().eval(), SMALL) if kind == "small" else (copy.deepcopy(open_clip_model), ("attn", "c_fc"))


def train_a_little(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))


def embeds(model, images):
    with torch.no_grad():
        return model.encode_image(images).embeds, model.encode_text(model.tokenize(TEXTS)).embeds


@pytest.mark.parametrize("kind", ["small", "open_clip"])
def test_adapters_change_nothing_until_trained_and_merge_into_the_plain_model(kind, open_clip_model):
    model, targets = small_model(kind, open_clip_model)
    plain = copy.deepcopy(model)
    images = torch.rand(2, 3, 32, 32)
    stream = torch.get_rng_state()
    add_adapters(model, AdapterSettings(targets=targets), seed=3)
    assert torch.equal(torch.get_rng_state(), stream)
    for before, after in zip(embeds(plain, images), embeds(model, images), strict=True):
        torch.testing.assert_close(after, before)
    train_a_little(model)
    whole = merged(model)
    assert whole.state_dict().keys() == plain.state_dict().keys()
    assert not any("lora" in name for name, _ in whole.named_modules())
    # An encoder without gradients, as in an attack, hears the adapters too.
    with_gradients = (
        model.encode_image(images).embeds.detach(),
        model.encode_text(model.tokenize(TEXTS)).embeds.detach(),
    )
    for of_merged, heard, live, untouched in zip(
        embeds(whole, images), embeds(model, images), with_gradients, embeds(plain, images), strict=True
    ):
        torch.testing.assert_close(of_merged, live, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(heard, live, atol=1e-5, rtol=1e-4)
        assert float((live - untouched).abs().max()) > 1e-2


def test_the_update_is_b_times_a_scaled():
    model = tiny_clip()
    weight = model.image_projection.weight.detach().clone()
    add_adapters(model, AdapterSettings(targets=("image_projection",), rank=2, alpha=6))
    train_a_little(model)
    a, b = (model.image_projection.get_parameter(f"lora_{x}.default.weight").detach() for x in "AB")
    assert a.shape == (2, weight.shape[1])
    torch.testing.assert_close(merged(model).image_projection.weight, weight + 6 / 2 * b @ a)


def test_only_adapters_train_and_equal_seeds_give_equal_ones():
    def adapted(seed):
        model = tiny_clip()
        add_adapters(model, AdapterSettings(targets=SMALL), seed=seed)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    first, same, other = adapted(0), adapted(0), adapted(1)
    assert first and all(".lora_" in name for name in first)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_file_is_rewritten_as_one_of_the_plain_model(tmp_path):
    model = tiny_clip().eval()
    add_adapters(model, AdapterSettings(targets=SMALL))
    train_a_little(model)
    path = tmp_path / "model.safetensors"
    save_weights(model, path, metadata={"steps": 3})
    fresh = tiny_clip(seed=9)
    add_adapters(fresh, AdapterSettings(targets=SMALL))
    merge_file(fresh, path)
    plain = tiny_clip(seed=8).eval()
    load_weights(plain, path)
    images = torch.rand(2, 3, 32, 32)
    for found, expected in zip(embeds(plain, images), embeds(model, images), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["fastmat"]) == {"steps": 3}


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("linear3",), "no module is called 'linear3'; did you mean 'linear2'"),
        (("blocks",), "'blocks' is a Sequential, and adapters fit Linear, Conv2d"),
        (("out_proj",), "the adapter of 'text_tower.layers.layers.0.self_attn.out_proj' changes nothing"),
    ],
)
def test_targets_that_cannot_be_adapted(targets, said):
    with pytest.raises(UserError, match=said):
        add_adapters(tiny_clip(), AdapterSettings(targets=targets))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"targets": ()}, "targets must name"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0}, "alpha must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_that_make_no_adapter(arguments, said):
    with pytest.raises(UserError, match=said):
        AdapterSettings(**{"targets": ("linear1",), **arguments})


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'fastmat-vlm\[adapters\]'"):
        add_adapters(tiny_clip(), AdapterSettings(targets=SMALL))
