"""The experts, against what the project's models say when asked one by one."""

import pytest
import torch
from batches import random_batch
from tiny_generators import save_captioner
from torch import nn

from fastmat.build import EXPERTS, Component, build_expert, locate, parse
from fastmat.errors import UserError
from fastmat.models.blip_captioner import BlipCaptioner, load_blip_captioner
from fastmat.models.protocol import VisionLanguageModel
from fastmat.models.tiny import tiny_clip
from fastmat.models.tiny_fusion import tiny_albef, tiny_albef_ve, tiny_blip
from fastmat.pipeline.base import Expert
from fastmat.pipeline.captioning import Captioning
from fastmat.pipeline.grounding import NOWHERE, REGIONS, Grounding, regions
from fastmat.pipeline.retrieval import Retrieval
from fastmat.pipeline.tagging import Tagging

CAPTIONS = ("a red dog runs", "two birds", "a man in the snow", "a red dog runs", "the blue ball")
IMAGES = random_batch().images


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> BlipCaptioner:
    return load_blip_captioner(str(save_captioner(tmp_path_factory.mktemp("captioner") / "model")), prompt="a")


@torch.no_grad()
def cosine(model: VisionLanguageModel, image: torch.Tensor, text: str) -> float:
    tokens = model.tokenize([text])
    return float(model.encode_image(image[None]).features[0] @ model.encode_text(tokens).features[0])


@pytest.mark.parametrize(
    "model", [tiny_clip().eval(), tiny_albef().eval(), tiny_blip().eval()], ids=["clip", "albef", "blip"]
)
def test_retrieval_says_the_nearest_caption(model: VisionLanguageModel) -> None:
    expert = Retrieval(vlm=model, gallery=CAPTIONS)
    said = expert.answer(IMAGES, [""] * len(IMAGES))
    for image, answer in zip(IMAGES, said, strict=True):
        best = max(cosine(model, image, caption) for caption in CAPTIONS)
        assert cosine(model, image, answer) == pytest.approx(best, abs=1e-5)


def test_tagging_says_the_names_nearest_on_average_over_templates() -> None:
    model, names = tiny_clip(), ("dog", "red ball", "snow", "man")
    templates = ("a photo of a {}", "the {} there")
    expert = Tagging(vlm=model, names=names, templates=templates, top=2)
    for image, answer in zip(IMAGES, expert.answer(IMAGES, [""] * len(IMAGES)), strict=True):
        scores = {}
        for name in names:
            with torch.no_grad():
                each = [model.encode_text(model.tokenize([t.replace("{}", name)])).features[0] for t in templates]
                mean = (each[0] + each[1]) / 2
                scores[name] = float(model.encode_image(image[None]).features[0] @ (mean / mean.norm()))
        assert answer == ", ".join(sorted(names, key=scores.__getitem__, reverse=True)[:2])
    assert "dog, red ball, snow, man" in expert.description


def test_captioning_is_the_captioners_own(captioner: BlipCaptioner) -> None:
    expert = Captioning(vlm=captioner)
    assert expert.answer(IMAGES[:2], ["", ""]) == captioner.generate(IMAGES[:2])


def test_grounding_depends_on_the_phrase_and_not_on_its_neighbours() -> None:
    model, generator = tiny_albef(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # so large that attention is no longer uniform
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    expert = Grounding(vlm=model, layer=1)
    phrases = ["a dog", "a red ball in the snow", "two birds", "a man", "the sky", "a", "one more", "a hat"]
    together = expert.answer(IMAGES, phrases[: len(IMAGES)])
    alone = [expert.answer(image[None], [phrase])[0] for image, phrase in zip(IMAGES, phrases, strict=False)]
    assert together == alone and set(together) <= {*REGIONS, NOWHERE} and len(set(together)) > 1
    assert any(expert.answer(IMAGES[:1], [phrase]) != together[:1] for phrase in phrases)


@pytest.mark.parametrize("side", [3, 4, 7, 24])
def test_regions_are_the_ninth_with_the_largest_mean(side: int) -> None:
    heat = torch.rand(20, side, side, generator=torch.Generator().manual_seed(side))
    edges = [(i * side // 3, -(-(i + 1) * side // 3)) for i in range(3)]
    for one, name in zip(heat, regions(heat), strict=True):
        means = [float(one[top:bottom, left:right].mean()) for top, bottom in edges for left, right in edges]
        assert name == REGIONS[means.index(max(means))]


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_leave_no_trace(name: str, captioner: BlipCaptioner) -> None:
    model = captioner if name == "captioning" else tiny_albef()
    assert isinstance(model, nn.Module)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = {"tagging": {"names": ["a", "b"]}, "grounding": {"layer": 0}}.get(name, {})
    expert: Expert = build_expert(Component(name=name, arguments=settings), vlm=model, gallery=CAPTIONS)
    assert len(expert.answer(IMAGES[:3], ["a dog"] * 3)) == 3
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    model.eval()


REFUSED = [
    ("captioning", {}, tiny_clip(), "DualEncoder writes no captions: take a model that does"),
    ("grounding", {}, tiny_clip(), "DualEncoder does not look at images with words"),
    ("grounding", {}, tiny_albef(), "layer must be 0 to 1"),
    ("retrieval", {}, tiny_albef_ve(), "Albef does not compare images with texts"),
    ("tagging", {"names": ["a", "b"]}, tiny_albef_ve(), "Albef does not compare images with texts"),
    ("tagging", {"names": ["a"]}, tiny_clip(), "names must be two or more"),
    ("tagging", {"names": ["a", "b"], "top": 3}, tiny_clip(), "top 1 to their number"),
    ("tagging", {"names": ["a", "a"]}, tiny_clip(), "two classes are called 'a'"),
    ("tagging", {"names": ["a", "b"], "templates": ["no place"]}, tiny_clip(), "each must hold {} once"),
]


@pytest.mark.parametrize(("name", "settings", "model", "said"), REFUSED)
def test_what_a_model_cannot_do_is_refused(
    name: str, settings: dict[str, object], model: VisionLanguageModel, said: str
) -> None:
    component = Component(name=name, arguments=settings)
    with pytest.raises(UserError) as caught:
        build_expert(component, vlm=model, gallery=CAPTIONS, where="experts.one")
    assert said in str(caught.value) and str(caught.value).startswith("experts.one: ")


def test_what_the_run_gives_is_no_key() -> None:
    for name in EXPERTS:
        locate(EXPERTS[name])
    with pytest.raises(UserError, match="'vlm' is not set here"):
        parse({"name": "retrieval", "vlm": "tiny"}, EXPERTS, where="")
    with pytest.raises(UserError, match="unknown key 'model'"):
        parse({"name": "retrieval", "model": "tiny"}, EXPERTS, where="")
