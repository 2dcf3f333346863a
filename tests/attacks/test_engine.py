"""How an attack is executed changes nothing of what it computes."""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from batches import random_batch
from tiny_mlm import tiny_mlm
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastmat.attacks import apgd, search
from fastmat.attacks.apgd import APGD
from fastmat.attacks.base import Attack, context_of
from fastmat.attacks.engine import Engine, active, compiled
from fastmat.attacks.mi_fgsm import MIFGSM
from fastmat.attacks.objectives import Contrastive, CosineToOwn, SquaredL2FromClean
from fastmat.attacks.pgd import PGD
from fastmat.attacks.search import ascend
from fastmat.attacks.square import Square
from fastmat.build import Component, build_attack
from fastmat.errors import UserError
from fastmat.evaluation.evaluate import run_attack
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.tiny import tiny_clip
from fastmat.types import ThreatModel

THREAT = ThreatModel(eps=8 / 255)
CAPTIONS = (2, 1, 3, 2, 1)


def attack_of(name: str, **arguments: object) -> Attack:
    return build_attack(Component(name=name, arguments=arguments), threat=THREAT, mlm=tiny_mlm, seed=3)


ATTACKS: dict[str, dict[str, object]] = {
    "pgd": {"steps": 3, "restarts": 2},
    "apgd": {"steps": 6, "restarts": 2},
    "sga": {"steps": 2},
    "square": {"n_queries": 20, "stop_when_lost": True},
}


def share_different(a: Tensor, b: Tensor) -> float:
    """Batched convolutions round differently, and a sign is a step."""
    return ((a - b).abs() > 1e-5).float().mean().item()


class Narrow:
    """Lets no more than `most` images through at once, as a device that is too small."""

    def __init__(self, model: DualEncoder, most: int) -> None:
        self.largest = 0
        self.most = most
        self.encode = model.encode_image
        model.encode_image = self

    def __call__(self, images: Tensor):
        if len(images) > self.most:
            raise torch.OutOfMemoryError(f"no room for {len(images)} images")
        self.largest = max(self.largest, len(images))
        return self.encode(images)


@pytest.mark.parametrize("name", ATTACKS)
def test_micro_batches_change_nothing(name: str) -> None:
    model, batch = tiny_clip().eval(), random_batch(CAPTIONS)
    whole_attack, parts_attack = (attack_of(name, **ATTACKS[name]) for _ in range(2))
    whole = whole_attack(model, batch)
    sizes = Narrow(model, 2)
    parts = parts_attack(model, batch, engine=Engine(micro_batch=2))  # the context, too, is of the whole batch
    assert sizes.largest == 2
    assert share_different(whole.images, parts.images) < 2e-3 and whole.texts == parts.texts
    torch.testing.assert_close(whole.distance, parts.distance)
    if isinstance(whole_attack, Square) and isinstance(parts_attack, Square):
        assert whole_attack.queries is not None and len(whole_attack.queries) == len(batch)
        assert torch.equal(whole_attack.queries, parts_attack.queries)


@pytest.mark.parametrize("name", ["sga", "square"])
def test_out_of_memory_halves_the_batch_and_goes_on(name: str, caplog) -> None:
    model, batch = tiny_clip().eval(), random_batch(CAPTIONS)
    context = context_of(model, batch)
    whole = attack_of(name, **ATTACKS[name])(model, batch, context)
    Narrow(model, 1)
    attack = attack_of(name, **ATTACKS[name])
    parts = attack(model, batch, context)
    assert share_different(whole.images, parts.images) < 2e-3 and whole.texts == parts.texts
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2  # 5, 2, 1
    attack(model, batch, context)
    assert len(caplog.records) == 2  # remembered
    Narrow(model, 0)
    with pytest.raises(UserError, match="memory does not hold the work on one image"):
        attack(model, batch, context)


class WholeBatch(PGD):
    splits = False


def test_an_attack_that_depends_on_its_batch_is_never_split() -> None:
    model, batch = tiny_clip().eval(), random_batch(CAPTIONS)
    context = context_of(model, batch)
    whole = PGD(threat=THREAT, steps=2)(model, batch, context)
    sizes = Narrow(model, 5)
    attack = WholeBatch(threat=THREAT, steps=2)
    assert torch.equal(whole.images, attack(model, batch, context, engine=Engine(micro_batch=1)).images)
    assert sizes.largest == 5
    Narrow(model, 4)
    with pytest.raises(UserError, match="one batch: choose a smaller batch_size"):
        attack(model, batch, context)


@pytest.mark.parametrize("objective", [Contrastive(), CosineToOwn(), SquaredL2FromClean()], ids=type)
def test_bf16_is_of_the_encoders_alone(objective) -> None:
    model, batch = tiny_clip().eval(), random_batch(CAPTIONS)
    context = context_of(model, batch)
    seen: list[tuple[torch.dtype, torch.dtype, bool]] = []

    class Watched:
        def bind(self, model, batch, context):
            value = objective.bind(model, batch, context)

            def watch(state):
                seen.append((state.embeds.dtype, state.features.dtype, torch.is_autocast_enabled("cpu")))
                return value(state)

            return watch

    inside: list[torch.dtype] = []
    hook = model.image_projection.register_forward_hook(lambda module, given, output: inside.append(output.dtype))
    exact = PGD(threat=THREAT, objective=objective, steps=5)(model, batch, context)
    assert set(inside) == {torch.float32}
    inside.clear()
    fast = PGD(threat=THREAT, objective=Watched(), steps=5)(model, batch, context, engine=Engine(precision="bf16"))
    hook.remove()
    assert set(inside) == {torch.bfloat16} and set(seen) == {(torch.float32, torch.float32, False)}
    assert fast.images.dtype == torch.float32 and (fast.distance <= THREAT.eps + 1e-6).all()
    assert not torch.equal(fast.images, exact.images)
    value = objective.bind(model, batch, context)
    with torch.no_grad():
        clean, slow, quick = (value(model.encode_image(x)).mean() for x in (batch.images, exact.images, fast.images))
    assert quick - clean > 0.9 * (slow - clean) > 0
    assert model.encode_text(model.tokenize(batch.texts)).features.dtype == torch.float32
    assert not {"encode_image", "encode_text"} & vars(model).keys() and active() == Engine()


def test_captions_are_encoded_in_bf16_too_and_come_out_in_fp32() -> None:
    model, batch = tiny_clip().eval(), random_batch()
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    model.text_projection.register_forward_hook(lambda module, given, output: seen.append((output.dtype,)))

    class Looks(Attack):
        def run(self, model, batch, context, draws):
            state = model.encode_text(model.tokenize(batch.texts))
            seen.append((state.embeds.dtype, state.features.dtype, state.tokens.dtype))
            return batch.images, batch.texts

    Looks(threat=THREAT)(model, batch, context_of(model, batch), engine=Engine(precision="bf16"))
    assert seen[1:] == [(torch.bfloat16,), (torch.float32,) * 3]


class Outer(Attack):
    """Runs another attack inside, once as it is itself run and once in fp32."""

    def run(self, model, batch, context, draws):
        inner = PGD(threat=self.threat, steps=1)
        self.made = [inner(model, batch, context, engine=engine).images for engine in (None, Engine())]
        return self.made[0], batch.texts


def test_an_attack_inside_an_attack_inherits_the_engine_or_brings_its_own() -> None:
    model, batch = tiny_clip().eval(), random_batch(CAPTIONS)
    context = context_of(model, batch)
    bf16, inner = Engine(precision="bf16"), PGD(threat=THREAT, steps=1)
    outer = Outer(threat=THREAT)
    outer(model, batch, context, engine=bf16)
    assert torch.equal(outer.made[0], inner(model, batch, context, engine=bf16).images)
    assert torch.equal(outer.made[1], inner(model, batch, context).images)
    assert not torch.equal(*outer.made)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model, batch = tiny_clip(), random_batch()
    with pytest.raises(UserError, match="no positive"):
        empty = replace(context_of(model, batch), text_group=torch.full((len(batch.texts),), -1))
        PGD(threat=THREAT)(model, batch, empty, engine=Engine(precision="bf16"))
    assert "encode_image" not in vars(model) and active() == Engine() and model.training


def test_run_attack_hands_the_engine_on() -> None:
    model, batch = tiny_clip().eval(), random_batch(CAPTIONS)
    sizes = Narrow(model, 5)
    list(run_attack(model, PGD(threat=THREAT, steps=1), [batch], context_of(model, batch), Engine(micro_batch=2)))
    assert sizes.largest == 5  # the context's
    sizes.largest = 0
    list(run_attack(model, PGD(threat=THREAT, steps=1), [batch], context_of(model, batch.rows(0, 5)), Engine()))
    assert sizes.largest == 5


def test_engines_that_make_no_sense_are_refused() -> None:
    for settings, reason in [
        ({"precision": "fp16"}, "precision must be one of fp32, bf16, got 'fp16'"),
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
    ]:
        with pytest.raises(UserError, match=reason):
            Engine(**settings)
    model, batch = tiny_clip(), random_batch()
    with pytest.raises(UserError, match="cuda_graph needs a model on a CUDA device, this one is on cpu"):
        PGD(threat=THREAT)(model, batch, engine=Engine(cuda_graph=True))


class Replayed:
    """What a CUDA graph does to its caller, on any device: results are the same tensors at every call, and nothing but
    tensors gets in, because Python runs for the recording alone."""

    calls = 0

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work
        self.result: object = None

    def __call__(self) -> object:
        Replayed.calls += 1
        made = self.work()
        if isinstance(made, tuple) and self.result is not None:
            for old, new in zip(self.result, made, strict=True):
                old.copy_(new)
        else:
            self.result = made
        return self.result


@pytest.fixture
def replayed(monkeypatch) -> None:
    """cuda_graph, with the graph replaced by what it demands of its users."""
    Replayed.calls = 0
    for module in (search, apgd):
        monkeypatch.setattr(module, "active", lambda: Engine(cuda_graph=True))
        monkeypatch.setattr(module, "Repeated", Replayed)


@pytest.mark.parametrize("attack", [PGD(threat=THREAT), MIFGSM(threat=THREAT), APGD(threat=THREAT, steps=30)], ids=type)
def test_a_captured_loop_is_the_loop(attack: Attack, request) -> None:
    model, batch = tiny_clip().eval(), random_batch(CAPTIONS)
    context = context_of(model, batch)
    plain = attack(model, batch, context).images
    request.getfixturevalue("replayed")
    assert torch.equal(attack(model, batch, context).images, plain)
    assert Replayed.calls == attack.steps


def test_captured_steps_get_their_noise_from_outside(replayed) -> None:
    x0, drawn = torch.full((2, 3, 4, 4), 0.5), []

    def noise(step: int) -> Tensor:
        return torch.full_like(x0, float(step + 1))

    def value(x: Tensor, noise: Tensor) -> Tensor:
        drawn.append((noise.data_ptr(), noise.mean().item()))
        return (x * noise).flatten(1).sum(1)

    ascend(value, x0, x0, threat=THREAT, steps=4, step_size=0.01, noise=noise)
    assert [mean for _, mean in drawn] == [1, 2, 3, 4] and len({address for address, _ in drawn}) == 1


def test_the_loops_do_only_what_they_must(monkeypatch) -> None:
    """No weight gradients and no waiting for the device; targets and captions are encoded before the loop."""
    monkeypatch.setattr("fastmat.ops.pgd.check_values", lambda *_, **__: None)  # waits, but on a CPU alone
    model, batch = tiny_clip().eval(), random_batch(CAPTIONS)
    context = context_of(model, batch)
    for attack in (lambda n: PGD(threat=THREAT, steps=n), lambda n: APGD(threat=THREAT, steps=n)):
        counts = []
        for steps in (2, 3):
            with profile(activities=[ProfilerActivity.CPU]) as trace:
                attack(steps)(model, batch, context)
            counts.append({event.key: event.count for event in trace.key_averages()})
        more = {name: counts[1].get(name, 0) - counts[0].get(name, 0) for name in counts[1]}
        waits = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::embedding")
        assert not {name: more[name] for name in waits if more.get(name)}
        assert more["aten::convolution_backward"] == more["aten::convolution"] > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
def test_compiled_encoders_are_made_once_and_compute_the_same() -> None:
    from torch._dynamo.utils import counters

    model = tiny_clip().eval()
    engine = Engine(compile=True)
    compiled.cache_clear()
    frames = []
    for captions in ((2, 1, 3), (1, 1), (1,) * 5, (2, 2, 2, 2), (1,) * 7, (1,) * 6):
        batch = random_batch(captions)
        context = context_of(model, batch)
        attack = PGD(threat=THREAT, steps=3)
        fast = attack(model, batch, context, engine=engine).images
        assert share_different(fast, attack(model, batch, context).images) < 0.01
        frames.append(counters["stats"]["unique_graphs"])
    assert frames[-1] == frames[2], frames  # the second size made it one for any


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attack", [PGD(threat=THREAT), MIFGSM(threat=THREAT), APGD(threat=THREAT, steps=20)], ids=type)
def test_cuda_graphs_compute_the_same_without_waiting(attack: Attack) -> None:
    model, batch = tiny_clip().eval().cuda(), random_batch(CAPTIONS).to("cuda")
    context = context_of(model, batch)
    plain = attack(model, batch, context).images
    graphed = attack(model, batch, context, engine=Engine(cuda_graph=True)).images
    assert share_different(plain, graphed) < 2e-3
