"""Less memory, same gradients: micro-batches, recomputed blocks, the compiled forward."""

import pytest
import torch
from training.synthetic import Synthetic, make_batch, model_with_state, settings, weights_of

import fastmat.training.outer as outer_module
from fastmat.defences.finetune import FineTune
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.training.loop import train
from fastmat.training.outer import Outer, checkpointed_blocks, repeated_blocks

CPU = torch.device("cpu")


def gradients(model, told, *, images=3):
    """Of a loss that reads every field with a gradient, images and texts in different numbers."""
    batch = make_batch(size=images, seed=1)
    outer = Outer(model, told, device=CPU)
    torch.manual_seed(7)
    out = outer(batch.images, model.tokenize(batch.texts))
    weight = torch.arange(1.0, 1 + len(batch.images))[:, None]
    loss = (out.image.embeds * weight).square().sum() + out.image.tokens.mean() + out.text.tokens.square().mean()
    loss = loss + (out.logit_scale * out.image.features[batch.txt2img] @ out.text.features.T).logsumexp(1).sum()
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, loss.detach()


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 100])
def test_micro_batches_have_the_gradients_of_the_whole(micro_batch):
    whole, value = gradients(tiny_clip().train(), settings())
    parts, same = gradients(tiny_clip().train(), settings(micro_batch=micro_batch))
    torch.testing.assert_close(same, value)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=2e-5 * largest + 1e-7, msg=name)


def test_micro_batches_run_one_by_one_and_once_more_in_the_backward():
    sizes = []
    model = tiny_clip().train()
    model.image_projection.register_forward_pre_hook(
        lambda module, x: sizes.append((len(x[0]), torch.is_grad_enabled()))
    )
    gradients(model, settings(micro_batch=2), images=5)
    assert [size for size, _ in sizes] == [2, 2, 1, 1, 2, 2]


def test_dropout_drops_the_same_in_both_passes(monkeypatch):
    """Against the same parts encoded once, with everything kept: equal only if the second pass replays the first."""

    def model():
        made = model_with_state()
        made.image_projection[1].eval()
        return made

    replayed, _ = gradients(model(), settings(micro_batch=2))
    monkeypatch.setattr(outer_module, "checkpoint", lambda encode, *part, use_reentrant: encode(*part))
    kept, _ = gradients(model(), settings(micro_batch=2))
    assert all(torch.equal(kept[name], gradient) for name, gradient in replayed.items())


def test_blocks_compute_again_when_training_and_never_in_an_attack():
    model, calls = tiny_clip().train(), []
    (block,) = repeated_blocks(model)
    block.linear1.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    whole, _ = gradients(model, settings())
    assert len(calls) == 1
    with checkpointed_blocks(model, True):
        again, _ = gradients(model, settings())
        assert len(calls) == 3
        model.eval()
        gradients(model, settings())
        assert len(calls) == 4
    assert all(torch.equal(whole[name], gradient) for name, gradient in again.items())
    model.train()
    gradients(model, settings())
    assert len(calls) == 5


def test_repeated_blocks_are_the_outermost_stacks():
    stage = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    mixed = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), stage)
    assert repeated_blocks(mixed) == list(stage)
    stack = torch.nn.ModuleList([torch.nn.Sequential(stage), torch.nn.Sequential(torch.nn.Linear(2, 2))])
    assert repeated_blocks(torch.nn.ModuleDict({"a": stack, "b": torch.nn.Sequential(torch.nn.ReLU())})) == list(stack)
    with pytest.raises(UserError, match="needs a model of repeated blocks"), checkpointed_blocks(torch.nn.ReLU(), True):
        pass


@pytest.mark.parametrize("option", [{"micro_batch": 2}, {"activation_checkpointing": True}])
def test_norm_statistics_are_never_counted_twice(option):
    with pytest.raises(UserError, match="would count twice"):
        settings(norm_statistics="batch", **option)


@pytest.mark.slow  # the compiler takes its time
def test_a_compiled_run_is_the_run(tmp_path):
    for compile in (False, True):
        told = settings(steps=3, lr=1e-3, compile=compile)
        train(tiny_clip(), FineTune(), Synthetic(), settings=told, out=tmp_path / str(compile), config={})
    first, second = (weights_of(tmp_path / name / "model.safetensors") for name in ("False", "True"))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=2e-3 if "in_proj_bias" in key else 1e-4, msg=key)
