"""The loop: learns, resumes bit for bit, stops cleanly, refuses what it should."""

import json
import math
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from training.synthetic import THREAT, SwapWord, Synthetic, make_batch, model_with_state, settings, weights_of

from fastmat.defences.fare import FARE
from fastmat.defences.finetune import FineTune
from fastmat.defences.mat import MAT
from fastmat.defences.tecoa_itr import TeCoAITR
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.training.interrupt import Interrupted, interruptible
from fastmat.training.loop import train


def defence_of(name, model):
    return {
        "finetune": lambda: FineTune(),
        "tecoa_itr": lambda: TeCoAITR(threat=THREAT, steps=1),
        "fare": lambda: FARE(threat=THREAT, teacher=model, steps=1),
        "mat": lambda: MAT(threat=THREAT, text_search=SwapWord(), steps=1),
    }[name]()


def run(out, *, name="mat", batches=None, resume=False, config=None, model=None, **changes):
    model = model or model_with_state()
    report = train(
        model,
        defence_of(name, model),
        batches or Synthetic(),
        settings=settings(**changes),
        out=out,
        resume=resume,
        config=config or {"model": "tiny"},
    )
    return model, report


class StopsAt(Synthetic):
    """Sends this process a Ctrl-C while the batch of one step is being fetched."""

    step: int = 2

    def iterate(self, start, stop, **share):
        for step, batch in zip(range(start, stop), super().iterate(start, stop, **share), strict=True):
            if step == self.step:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


@pytest.mark.parametrize("name", ["finetune", "tecoa_itr", "fare", "mat"])
def test_interrupted_and_resumed_gives_the_same_weights_bit_for_bit(tmp_path, name):
    settings = {"name": name, "norm_statistics": "batch", "save_every": 100}
    _, whole = run(tmp_path / "whole", **settings)
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path / "parts", batches=StopsAt(), **settings)
    assert stopped.value.checkpoint == tmp_path / "parts" / "checkpoints" / "step-00000003"
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    torch.manual_seed(99)  # a resumed process has another past
    _, parts = run(tmp_path / "parts", resume=True, **settings)
    assert parts.resumed_from == 3
    first, second = weights_of(whole.weights), weights_of(parts.weights)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    start = model_with_state().state_dict()
    assert any(not torch.equal(first[key], start[key]) for key in first)
    logs = [[json.loads(line) for line in (p / "log.jsonl").read_text().splitlines()]
            for p in (tmp_path / "whole", tmp_path / "parts")]  # fmt: skip
    assert [line["step"] for line in logs[0]] == list(range(1, 7))
    for key in ("step", "loss", "lr", "grad_norm", "terms"):
        assert [line[key] for line in logs[0]] == [line[key] for line in logs[1]]


def test_resuming_after_a_crash_drops_the_log_of_the_lost_steps(tmp_path):
    class Crashes(Synthetic):
        def iterate(self, start, stop, **share):
            for step, batch in zip(range(start, stop), super().iterate(start, stop, **share), strict=True):
                if step == 5:
                    raise OSError("disk gone")
                yield batch

    with pytest.raises(OSError, match="disk gone"):
        run(tmp_path / "a", batches=Crashes())
    _, whole = run(tmp_path / "b")
    _, parts = run(tmp_path / "a", resume=True)
    assert parts.resumed_from == 3
    steps = [json.loads(line)["step"] for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))
    first, second = weights_of(whole.weights), weights_of(parts.weights)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_every_step_and_seed_has_its_own_draws(tmp_path):
    seen = []

    class Draws(FineTune):
        def perturb(self, model, batch, draws):
            seen.append(draws.uniform("start", torch.zeros(1, dtype=torch.int64), (2,)).flatten().tolist())
            return super().perturb(model, batch, draws)

    for seed in (0, 0, 1):
        told = settings(steps=3, seed=seed)
        train(tiny_clip(), Draws(), Synthetic(), settings=told, out=tmp_path / str(len(seen)), config={})
    assert seen[:3] == seen[3:6]
    assert len({tuple(draw) for draw in seen}) == 6


def test_seed_decides(tmp_path):
    _, a = run(tmp_path / "a", steps=2)
    _, b = run(tmp_path / "b", steps=2)
    _, c = run(tmp_path / "c", steps=2, seed=1)
    a, b, c = (weights_of(report.weights) for report in (a, b, c))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_loss_falls_and_the_log_tells(tmp_path):
    class Same(Synthetic):
        def iterate(self, start, stop, **share):
            return (make_batch(seed=0) for _ in range(start, stop))

    model = tiny_clip()
    _, report = run(tmp_path / "a", name="tecoa_itr", batches=Same(), model=model, steps=25, lr=3e-3, warmup_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["loss"] == pytest.approx(sum(report.terms.values()))
    assert lines[0]["lr"] == pytest.approx(1.5e-3) and lines[1]["lr"] == pytest.approx(3e-3)
    told = {"step", "loss", "terms", "grad_norm", "lr", "skipped", "seconds", "pairs_per_s", "taken"}
    assert set(lines[0]) == told
    assert report.steps == 25 and report.skipped == 0 and report.pairs_per_s > 0
    saved = weights_of(report.weights)
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())


def test_one_step_is_adamw_on_the_clipped_gradient(tmp_path):
    """The first update against plain PyTorch."""
    model, twin = tiny_clip(), tiny_clip()
    run(tmp_path / "a", name="finetune", model=model, steps=1, warmup_steps=0, clip_norm=1.0, weight_decay=0.1)
    batch = make_batch(seed=0)
    twin.train()
    out = twin(batch.images, twin.tokenize(batch.texts))
    logits = out.logit_scale * out.image.features @ out.text.features.T
    positive = (batch.group[:, None] == batch.text_group[None, :]).float()
    i2t = -(logits.log_softmax(1) * positive / positive.sum(1, keepdim=True)).sum(1).mean()
    t2i = -(logits.log_softmax(0) * positive / positive.sum(0, keepdim=True)).sum(0).mean()
    ((i2t + t2i) / 2).backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    assert norm > 1.0
    for parameter in twin.parameters():
        decay = 0.1 if parameter.ndim > 1 else 0.0
        optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=decay)
        optimizer.step()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        clear = b.grad.abs() > 1e-6  # AdamW's first step blows the rounding of tiny gradients up
        assert clear.any(), name
        torch.testing.assert_close(a[clear], b[clear], rtol=1e-4, atol=1e-5, msg=name)


def test_logit_scale_stays_at_one_hundred_or_below(tmp_path):
    model = tiny_clip()
    with torch.no_grad():
        model.log_logit_scale.fill_(6.0)
    run(tmp_path / "a", name="finetune", model=model, steps=1)
    assert model.logit_scale.item() == pytest.approx(100, rel=1e-6)


def test_a_second_ctrl_c_interrupts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), interruptible() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert asked()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["fare", "vision_only"])
def test_untrained_tower_and_logit_scale_do_not_move(tmp_path, name):
    model = model_with_state()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    defence = (
        FARE(threat=THREAT, teacher=model, steps=1)
        if name == "fare"
        else TeCoAITR(threat=THREAT, steps=1, trains=("image",))
    )
    train(model, defence, Synthetic(), settings=settings(steps=2), out=tmp_path / "a", config={})
    after = model.state_dict()
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved and all(key.startswith("image_") for key in moved)
    assert not any("running" in key for key in moved)  # norm_statistics="fixed"
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_batch_statistics_train_when_asked(tmp_path):
    model = model_with_state()
    before = model.image_projection[1].running_mean.clone()
    run(tmp_path / "a", model=model, steps=1, norm_statistics="batch")
    assert not torch.equal(model.image_projection[1].running_mean, before)


def test_bf16_keeps_fp32_weights_and_fp32_features(tmp_path):
    seen = []

    class Watched(FineTune):
        def loss(self, features):
            seen.append((features.images["clean"], features.texts["clean"], features.logit_scale))
            return super().loss(features)

    losses = []
    for precision in ("no", "bf16"):
        model = tiny_clip()
        report = train(
            model, Watched(), Synthetic(), settings=settings(steps=2, precision=precision), out=tmp_path / precision,
            config={},
        )  # fmt: skip
        losses.append(sum(report.terms.values()))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    image, text, scale = seen[-1]
    assert image.embeds.dtype == image.features.dtype == text.features.dtype == scale.dtype == torch.float32
    assert image.tokens.dtype == torch.bfloat16  # the tower itself ran in bf16
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


class NaNAt(FineTune):
    """A loss that is NaN at some calls."""

    def __init__(self, *bad):
        super().__init__()
        self.bad = bad
        self.calls = 0

    def loss(self, features):
        terms = super().loss(features)
        factor = math.nan if self.calls in self.bad else 1.0
        self.calls += 1
        return {name: term * factor for name, term in terms.items()}


def test_a_step_without_a_finite_loss_is_skipped_and_counted(tmp_path):
    model, twin = tiny_clip(), tiny_clip()
    report = train(model, NaNAt(1, 2), Synthetic(), settings=settings(steps=3, warmup_steps=0), out=tmp_path / "a",
                   config={})  # fmt: skip
    assert report.skipped == 2
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 2] and [line["loss"] is None for line in lines] == [0, 1, 1]
    train(twin, FineTune(), Synthetic(), settings=settings(steps=1, warmup_steps=0), out=tmp_path / "b", config={})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_three_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"3 steps in a row \(up to step 6\).*step-00000003"):
        train(tiny_clip(), NaNAt(3, 4, 5), Synthetic(), settings=settings(), out=tmp_path / "a", config={})
    with pytest.raises(UserError, match="no checkpoint was saved"):
        train(tiny_clip(), NaNAt(0, 1, 2), Synthetic(), settings=settings(), out=tmp_path / "b", config={})
    report = train(tiny_clip(), NaNAt(0, 1, 3, 4), Synthetic(), settings=settings(), out=tmp_path / "c", config={})
    assert report.skipped == 4


def test_ctrl_c_handler_is_put_back(tmp_path):
    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        run(tmp_path / "a", batches=StopsAt())
    assert signal.getsignal(signal.SIGINT) is previous


def test_output_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("keep me")
    with pytest.raises(UserError, match="exists and is not empty"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", steps=2)[1].weights.exists()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="no undamaged checkpoint to resume"):
        run(tmp_path / "a", resume=True)
    assert not (tmp_path / "a").exists()


def test_resume_with_another_config_or_architecture(tmp_path):
    run(tmp_path / "a", config={"data": {"name": "digits", "size": 32}})
    run(tmp_path / "a", resume=True, config={"data": {"name": "digits", "size": 32}}, keep_last=1, save_every=50)
    log = (tmp_path / "a" / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"config\.data\.size was 32, is now 64"):
        run(tmp_path / "a", resume=True, config={"data": {"name": "digits", "size": 64}})
    with pytest.raises(UserError, match=r"settings\.lr was 0\.01, is now 0\.5"):
        run(tmp_path / "a", resume=True, config={"data": {"name": "digits", "size": 32}}, lr=0.5)
    with pytest.raises(UserError, match=r"does not fit this model: 5 missing \(image_projection\.3\.bias"):
        run(tmp_path / "a", resume=True, config={"data": {"name": "digits", "size": 32}}, model=_deeper())
    assert (tmp_path / "a" / "log.jsonl").read_bytes() == log


def _deeper():
    model = model_with_state()
    model.image_projection.append(torch.nn.BatchNorm1d(16))
    return model


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    _, first = run(tmp_path / "a")
    before = first.weights.read_bytes()
    _, second = run(tmp_path / "a", resume=True)
    assert second.resumed_from == 6 and second.weights.read_bytes() == before


def test_a_skipped_step_leaves_batch_norm_as_it_was(tmp_path):
    """The second step meets a NaN; the first one alone may have moved the statistics."""
    models = []
    for name, defence, steps in (("one", FineTune(), 1), ("two", NaNAt(1), 2)):
        model = model_with_state()
        told = settings(steps=steps, norm_statistics="batch", warmup_steps=0, lr=1e-9)
        train(model, defence, Synthetic(), settings=told, out=tmp_path / name, config={})
        models.append(model.image_projection[1])
    for buffer, other in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert torch.equal(buffer, other)
    assert int(models[1].num_batches_tracked) == 1


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_diverged_before_its_first_checkpoint_is_no_obstacle(tmp_path, resume):
    out = tmp_path / "a"
    with pytest.raises(UserError, match=r"no checkpoint was saved yet, so .* may be used again as it is"):
        train(tiny_clip(), NaNAt(1, 2, 3), Synthetic(), settings=settings(save_every=100), out=out, config={})
    with pytest.warns(UserWarning, match="ended before its first checkpoint; starting from the beginning"):
        _, report = run(out, resume=resume)
    assert report.resumed_from == 0
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))


def test_augmented_images_are_attacked_and_trained_on(tmp_path):
    seen = []

    def twice(batch, draws):
        seen.append(draws.uniform("augment", batch.index, (1,)).shape)
        return replace(
            batch,
            images=torch.cat([batch.images, batch.images.flip(3)]),
            index=torch.cat([batch.index, batch.index]),
            group=torch.cat([batch.group, batch.group]),
        )

    class Counted(FineTune):
        def loss(self, features):
            assert len(features.group) == 8 and len(features.images["clean"].features) == 8
            return super().loss(features)

    told = settings(steps=2)
    train(tiny_clip(), Counted(), Synthetic(), settings=told, out=tmp_path / "a", config={}, augment=twice)
    assert seen == [(4, 1)] * 2


def test_sigterm_is_a_request_and_a_second_one_changes_nothing():
    with interruptible(signal.SIGTERM) as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
