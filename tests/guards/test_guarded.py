"""The wrapper is a model: what it adds, what it passes on, and that every attack runs through it."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from annotated import write_refcoco
from batches import random_batch
from cli.conftest import Fastmat, fastmat, pictures  # noqa: F401
from tiny_mlm import tiny_mlm
from torch import Tensor, nn

from fastmat import build
from fastmat.attacks.draws import Draws
from fastmat.attacks.engine import Engine, _active
from fastmat.attacks.objectives import CosineToOwn
from fastmat.attacks.pgd import PGD
from fastmat.build import Component, build_attack, build_model, parse
from fastmat.errors import UserError
from fastmat.evaluation.evaluate import clean_ranks
from fastmat.evaluation.rerank import Rerank
from fastmat.guards.guarded import Guarded
from fastmat.models.protocol import captions_images, entails, fuses, has_embeddings, has_prefixes, unguarded
from fastmat.models.tiny import tiny_clip
from fastmat.models.weights import save_weights
from fastmat.types import ThreatModel

INNER = {"tiny": {}, "tiny_albef": {}, "tiny_blip": {}, "tiny_albef_ve": {}}
THREAT = ThreatModel(eps=8 / 255)


class Noise:
    random = True

    def __call__(self, images: Tensor, *, encode: Callable[[Tensor], Tensor], draws: Draws) -> Tensor:
        index = torch.arange(len(images))
        return (images + 0.1 * draws.uniform("noise", index, images.shape[1:])).clamp(0, 1)


class Nothing:
    random = False

    def __call__(self, images: Tensor, *, encode: Callable[[Tensor], Tensor], draws: Draws) -> Tensor:
        return images


def guarded(inner: str = "tiny", guard: object = "ttc", **arguments: object) -> Any:
    told = {"name": "guarded", "model": {"name": inner, "seed": 1}, "guard": guard, **arguments}
    return build_model(parse(told, build.MODELS, where="model"))


@pytest.mark.parametrize("inner", INNER)
def test_what_a_model_can_do_is_what_the_guarded_one_can(inner: str) -> None:
    bare = build_model(Component(name=inner, arguments={"seed": 1}))
    model = guarded(inner, "jpeg")
    for can in (fuses, has_prefixes, has_embeddings, entails, captions_images):
        assert can(model) == can(bare), can.__name__
    assert model.image_transform == bare.image_transform and model.context_length == bare.context_length
    assert torch.equal(model.logit_scale, bare.logit_scale)
    assert type(unguarded(model)) is type(bare) and unguarded(bare) is bare
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        model.nothing_of_the_kind  # noqa: B018


@pytest.mark.parametrize("inner", ["tiny", "tiny_albef", "tiny_blip"])
@torch.no_grad()
def test_a_guard_that_does_nothing_changes_nothing(inner: str) -> None:
    bare = build_model(Component(name=inner))
    model = Guarded(model=bare, guard=Nothing(), draws=3)
    batch = random_batch()
    tokens = model.tokenize(batch.texts)
    ours, theirs = model(batch.images, tokens), bare(batch.images, tokens)
    assert torch.equal(ours.image.features, theirs.image.features)
    assert torch.equal(ours.text.features, theirs.text.features)
    assert torch.equal(ours.logit_scale, theirs.logit_scale)
    if fuses(bare):
        fused = [m.fuse(s.image, s.text, batch.txt2img) for m, s in ((model, ours), (bare, theirs))]
        assert torch.equal(fused[0].itm_logits, fused[1].itm_logits)
        keys = model.image_keys(ours.image.tokens[:1])
        matched = model.match(keys, model.pack_texts(ours.text).take(torch.arange(2)))
        assert torch.allclose(matched, fused[1].itm_logits[:2], atol=1e-5)


@torch.no_grad()
def test_states_are_means_over_draws_and_can_be_replayed() -> None:
    batch = random_batch()
    model = guarded(guard="resize_pad", draws=4)
    state = model.encode_image(batch.images)
    again = model.encode_image(batch.images)
    assert not torch.equal(state.features, again.features)
    model.rewind()
    assert torch.equal(state.features, model.encode_image(batch.images).features)
    other = guarded(guard="resize_pad", draws=4, seed=1).encode_image(batch.images)
    assert not torch.equal(state.features, other.features)

    model.rewind()
    seen = model.guarded(batch.images.repeat(4, 1, 1, 1)).view(4, *batch.images.shape)
    own = [model.model.encode_image(images) for images in seen]
    for part in ("tokens", "embeds", "features"):
        mean = torch.stack([getattr(one, part) for one in own]).mean(0)
        assert torch.allclose(getattr(state, part), mean, atol=1e-5)


def test_the_gradient_of_a_linear_loss_is_the_mean_over_draws() -> None:
    """As the docstring says; and it is not, of a loss that is not linear."""
    model = Guarded(model=tiny_clip().eval().requires_grad_(False), guard=Noise(), draws=5)
    batch = random_batch()
    fixed = torch.randn(4, model.encode_image(batch.images).features.shape[1])

    def gradients(loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        model.rewind()
        live = batch.images.clone().requires_grad_(True)
        (at_once,) = torch.autograd.grad(loss(model.encode_image(live).features), live)
        model.rewind()
        seen = model.guarded(live.repeat(5, 1, 1, 1)).view(5, *live.shape)
        one_by_one = [
            torch.autograd.grad(loss(model.model.encode_image(s).features), live, retain_graph=True) for s in seen
        ]
        return at_once, torch.stack([gradient for (gradient,) in one_by_one]).mean(0)

    at_once, mean = gradients(lambda features: (features * fixed).sum())
    assert torch.allclose(at_once, mean, atol=1e-6)
    at_once, mean = gradients(lambda features: (20 * features @ fixed.T).logsumexp(1).sum())
    assert not torch.allclose(at_once, mean, atol=1e-3)


@pytest.mark.parametrize("guard", build.GUARDS)
@pytest.mark.parametrize("inner", ["tiny", "tiny_albef"])
def test_attacks_run_through_every_guard(inner: str, guard: str) -> None:
    model = guarded(inner, guard, draws=2)
    batch = random_batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {
        "pgd": {"steps": 2},
        "apgd": {"steps": 2},
        "square": {"n_queries": 3},
        "sga": {"steps": 1, "scales": [0.5]},
    }
    for name, arguments in settings.items():
        attack = build_attack(Component(name=name, arguments=arguments), threat=THREAT, mlm=tiny_mlm, seed=0)
        result = attack(model, batch)
        assert 0 < float(result.distance.max()) <= THREAT.eps + 1e-6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_attack_through_the_guard_beats_one_without_it() -> None:
    """Resize and pad: PGD on the bare model against PGD through it, by the objective behind the guard."""
    bare = build_model(Component(name="tiny", arguments={"seed": 1}))
    batch = random_batch((2,) * 8)
    made = {}
    for label, surrogate in (("bare", bare), ("guard", Guarded(model=bare, guard=Noise(), draws=8, seed=1))):
        attack = PGD(threat=ThreatModel(eps=4 / 255), objective=CosineToOwn(), steps=10)
        made[label] = attack(surrogate, batch).images
    judge = Guarded(model=bare, guard=Noise(), draws=64)
    value = CosineToOwn().bind(judge, batch, None)
    with torch.no_grad():
        clean, bare_only, through = (value(judge.encode_image(x)).mean() for x in (batch.images, *made.values()))
    assert clean < bare_only < through


def test_batch_norms_behind_a_guard_are_still_folded() -> None:
    from fastmat.attacks.folding import _pairs, folded

    bare = build_model(Component(name="small", arguments={"vocabulary": None, "widths": [8, 8]}))
    norms = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)).eval()
    bare.image_tower.blocks.insert(0, norms)  # type: ignore[attr-defined]
    model = Guarded(model=bare, guard=Noise())
    with folded(model):
        pass
    assert len(_pairs[bare]) == 1 and model.calls == 0  # type: ignore[index]


def test_bf16_leaves_the_pixels_alone() -> None:
    class Seen(Noise):
        def __call__(self, images: Tensor, *, encode: Callable[[Tensor], Tensor], draws: Draws) -> Tensor:
            self.product = images[:, 0] @ images[:, 0]
            return super().__call__(images, encode=encode, draws=draws)

    guard = Seen()
    model = Guarded(model=tiny_clip().eval(), guard=guard)
    PGD(threat=THREAT, steps=1)(model, random_batch(), engine=Engine(precision="bf16"))
    assert guard.product.dtype == torch.float32


def test_a_projection_is_replaced_in_the_model() -> None:
    model = Guarded(model=tiny_clip().eval(), guard=Nothing())
    inner = model.model
    model.image_projection = nn.Sequential(inner.image_projection, nn.Hardtanh(-1e-3, 1e-3))
    assert isinstance(inner.image_projection, nn.Sequential) and "image_projection" not in model._modules
    with torch.no_grad():
        assert float(model.encode_image(torch.rand(2, 3, 32, 32)).embeds.abs().max()) < 1.01e-3


def test_generation_sees_guarded_images() -> None:
    class Captioner(nn.Module):
        def generate(self, images: Tensor) -> list[str]:
            return [f"{float(image.max()):.2f}" for image in images]

    class Black(Nothing):
        def __call__(self, images: Tensor, *, encode: Callable[[Tensor], Tensor], draws: Draws) -> Tensor:
            return images * 0

    model = Guarded(model=Captioner(), guard=Black())  # type: ignore[arg-type]
    assert model.generate(torch.ones(2, 3, 4, 4)) == ["0.00", "0.00"]


def test_weights_of_the_model_inside(tmp_path: Any) -> None:
    trained = tiny_clip(seed=5)
    save_weights(trained, tmp_path / "model.safetensors")
    told = {
        "name": "guarded",
        "model": {"name": "tiny", "weights": str(tmp_path / "model.safetensors")},
        "guard": "jpeg",
    }
    component = parse(told, build.MODELS, where="model")
    build.check_weights(component, where="model")
    x = torch.rand(2, 3, 32, 32)
    guard = build_model(component)
    assert torch.equal(guard.model.encode_image(x).embeds, trained.eval().encode_image(x).embeds)  # type: ignore[attr-defined]
    told["model"]["weights"] = "nowhere.safetensors"  # type: ignore[index]
    with pytest.raises(UserError, match=r"model\.model: weights file nowhere\.safetensors does not exist"):
        build.check_weights(parse(told, build.MODELS, where="model"), where="model")


@pytest.mark.parametrize("inner", ["tiny_albef", "tiny_blip"])
def test_both_stages_of_retrieval_see_guarded_images(inner: str) -> None:
    batch = random_batch((2,) * 6)
    model = guarded(inner, "jpeg")
    ranks = clean_ranks(model, [batch], rerank=Rerank(k=3))
    seen = batch.replace(images=model.guarded(batch.images).detach())
    told = clean_ranks(unguarded(model), [seen], rerank=Rerank(k=3))
    assert torch.equal(ranks.tr, told.tr) and torch.equal(ranks.ir, told.ir)
    bare = clean_ranks(unguarded(model), [batch], rerank=Rerank(k=3))
    assert not (torch.equal(ranks.tr, bare.tr) and torch.equal(ranks.ir, bare.ir))


def test_no_cuda_graph_of_a_random_guard() -> None:
    token = _active.set(Engine(cuda_graph=True))
    try:
        with pytest.raises(UserError, match="leave cuda_graph off"):
            guarded().encode_image(torch.rand(1, 3, 32, 32))
        guarded(guard="jpeg").encode_image(torch.rand(1, 3, 32, 32))
    finally:
        _active.reset(token)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("{name: guarded, model: tiny, guard: jpg}", "unknown name 'jpg'; did you mean 'jpeg'?"),
        ("{name: guarded, model: tiny, guard: {name: jpeg, quality: 0}}", "quality must be 1 to 100"),
        ("{name: guarded, model: tiny, guard: jpeg, draws: 0}", "draws must be at least 1, got 0"),
        ("{name: guarded, model: tiny}", "'guard' is missing"),
        (
            "{name: guarded, model: tiny, guard: {name: frequency_masking, detector: nowhere.safetensors}}",
            "detector file nowhere.safetensors does not exist",
        ),
        (
            "{name: guarded, model: {name: tiny, weights: nowhere.safetensors}, guard: jpeg}",
            "weights file nowhere.safetensors does not exist",
        ),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(
    fastmat: Fastmat,  # noqa: F811
    pictures: Any,  # noqa: F811
    tmp_path: Any,
    model: str,
    said: str,
) -> None:
    data = f"data={{name: json, title: six, split: test, annotations: {pictures}/test.json, images: {pictures}}}"
    code, _, error = fastmat("eval", f"victims.one.model={model}", data, "--out", tmp_path / "out")
    assert code == 2 and said in error and error.count("\n") == 1, error


def test_eval_judges_a_guarded_victim(fastmat: Fastmat, pictures: Any, tmp_path: Any) -> None:  # noqa: F811
    data = f"data={{name: json, title: six, split: test, annotations: {pictures}/test.json, images: {pictures}}}"
    model = "{name: guarded, model: tiny, guard: resize_pad, draws: 2}"
    code, shown, error = fastmat(
        "eval", f"victims.one.model={model}", data, "attacks={pgd: {name: pgd, steps: 1}}", "--out", tmp_path / "out"
    )
    assert code == 0, error
    assert "pgd *" in shown  # white box, through the guard


def test_a_task_through_a_guard(fastmat: Fastmat, tmp_path: Any) -> None:  # noqa: F811
    task = json.dumps({"name": "grounding", **write_refcoco(tmp_path / "refcoco"), "layer": 1})
    model = "{name: guarded, model: tiny_albef, guard: resize_pad, draws: 2}"
    words = ["task", f"task={task}", f"victims.one.model={model}", "attacks={pgd: {name: pgd, steps: 1}}"]
    code, shown, error = fastmat(*words, "resamples=20", "examples=0", "--out", tmp_path / "out")
    assert code == 0, error
    assert "PGD" in shown and "white-box" in shown
