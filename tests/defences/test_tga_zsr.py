"""TGA-ZSR against its formula written out: where a text looks, place by place, and how far that may move."""

import copy

import pytest
import torch
from defences.labelled_batch import LABELS, PROMPTS, class_features, labelled_batch
from training.synthetic import THREAT, make_batch, model_with_state
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from fastmat.attacks.draws import SeededDraws
from fastmat.defences.tecoa_itr import TeCoAITR
from fastmat.defences.tga_zsr import TGAZSR, place_embeds, text_guided_attention
from fastmat.errors import UserError
from fastmat.models.hf_clip import VisionTower
from fastmat.models.protocol import ImageState
from fastmat.models.tiny import tiny_clip
from fastmat.training.forward import encode_views


def student_of(teacher):
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.image_projection.weight.mul_(torch.linspace(0.2, 1.8, 16)[:, None])
    return student


def attention(model, image, text):
    """[32, 32]: each of the 8 x 8 places alone in the grid, projected, its cosine with the text; scaled; enlarged."""
    grid = model.image_tower.blocks((image[None] - model.mean) / model.std)[0]  # [C, 8, 8]
    side = grid.shape[1]
    cosine = torch.empty(side, side)
    for y in range(side):
        for x in range(side):
            alone = torch.zeros_like(grid)
            alone[:, y, x] = grid[:, y, x]
            embed = model.image_projection.weight @ alone.flatten()
            cosine[y, x] = (embed * text).sum() / embed.norm()
    scaled = (cosine - cosine.min()) / (cosine.max() - cosine.min())
    out, factor = torch.empty(32, 32), side / 32
    for i in range(32):
        for j in range(32):
            u, v = (max((k + 0.5) * factor - 0.5, 0.0) for k in (i, j))
            top, left = int(u), int(v)
            bottom, right = min(top + 1, side - 1), min(left + 1, side - 1)
            a, b = u - top, v - left
            upper = (1 - b) * scaled[top, left] + b * scaled[top, right]
            lower = (1 - b) * scaled[bottom, left] + b * scaled[bottom, right]
            out[i, j] = (1 - a) * upper + a * lower
    return out


@pytest.mark.parametrize("form", ["classes", "captions"])
@torch.no_grad()
def test_loss_is_the_published_formula(form):
    teacher = tiny_clip().eval()
    student = student_of(teacher)
    classes = {"against": "classes", "prompts": PROMPTS} if form == "classes" else {}
    defence = TGAZSR(threat=THREAT, teacher=teacher, **classes)
    batch = labelled_batch() if classes else make_batch(size=3)
    views = defence.perturb(student, batch, SeededDraws(0))
    features = encode_views(student, student, views, batch)
    terms = defence.loss(features)

    if classes:
        texts = class_features(student)[list(LABELS)]
    else:
        each = student.encode_text(student.tokenize(batch.texts)).features
        texts = torch.stack([each[batch.txt2img == i].sum(0) for i in range(3)])
        texts = texts / texts.norm(dim=1, keepdim=True)
    adv, clean = [], []
    for image, attacked, text in zip(batch.images, views.images["adv"], texts, strict=True):
        original = attention(teacher, image, text)
        adv.append((attention(student, attacked, text) - original).norm())
        clean.append((attention(student, image, text) - original).norm())
    torch.testing.assert_close(terms["attention/refinement"], 0.08 * torch.stack(adv).mean(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(terms["attention/constraint"], 0.05 * torch.stack(clean).mean(), rtol=1e-3, atol=1e-5)
    assert float(terms["attention/constraint"]) > 1e-3
    if not classes:
        torch.testing.assert_close(terms["contrastive"], TeCoAITR(threat=THREAT).loss(features)["contrastive"])


def test_a_projection_of_tokens_embeds_each_token():
    tokens = torch.randn(2, 9, 5)
    projection = torch.nn.Linear(5, 4, bias=False)
    embeds = place_embeds(projection, ImageState(tokens, torch.zeros(2, 4), torch.zeros(2, 4)))
    torch.testing.assert_close(embeds, tokens @ projection.weight.T)
    text = torch.nn.functional.normalize(torch.randn(2, 4), dim=1)
    seen = text_guided_attention(projection, ImageState(tokens, embeds[:, 0], embeds[:, 0]), text, (3, 3))
    cosine = torch.stack([torch.cosine_similarity(embeds[i], text[i][None]) for i in range(2)])
    low, high = cosine.amin(1, keepdim=True), cosine.amax(1, keepdim=True)
    torch.testing.assert_close(seen.flatten(1), (cosine - low) / (high - low))


def test_tokens_of_transformers_clip_are_what_its_projection_expects():
    """The last layer norm comes before the projection, for patches as for the class token."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=16)
    clip = CLIPVisionModelWithProjection(config).eval()
    torch.nn.init.normal_(clip.vision_model.post_layernorm.bias)
    images = torch.rand(2, 3, 32, 32)
    pooled, tokens = VisionTower(clip.vision_model)(images)
    hidden = clip.vision_model(pixel_values=images, output_hidden_states=True).hidden_states[-1]
    norm = clip.vision_model.post_layernorm
    every = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    every = every * norm.weight + norm.bias
    torch.testing.assert_close(pooled, every[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens, every[:, 1:], rtol=1e-4, atol=1e-5)
    embeds = place_embeds(clip.visual_projection, ImageState(tokens, pooled, pooled))
    torch.testing.assert_close(embeds, every[:, 1:] @ clip.visual_projection.weight.T, rtol=1e-4, atol=1e-5)


def test_attention_trains_the_tower_with_the_projection_of_the_step_as_a_constant():
    teacher, batch = tiny_clip().eval(), make_batch()
    student = student_of(teacher)
    defence = TGAZSR(threat=THREAT, teacher=teacher)
    terms = defence.loss(encode_views(student, student, defence.perturb(student, batch, SeededDraws(0)), batch))
    for name in ("attention/refinement", "attention/constraint"):
        first = student.image_tower.blocks[0].weight
        of_tower, of_projection = torch.autograd.grad(
            terms[name], (first, student.image_projection.weight), retain_graph=True, allow_unused=True
        )
        assert float(of_tower.abs().max()) > 0 and of_projection is None


def test_an_image_that_looks_alike_everywhere_gives_no_nan():
    projection = torch.nn.Linear(5, 4)
    state = ImageState(torch.ones(1, 4, 5, requires_grad=True), torch.zeros(1, 4), torch.zeros(1, 4))
    seen = text_guided_attention(projection, state, torch.eye(4)[:1], (8, 8))
    assert bool(seen.isfinite().all())
    (gradient,) = torch.autograd.grad(seen.sum(), state.tokens)
    assert bool(gradient.isfinite().all())


def test_towers_that_it_cannot_read_are_one_sentence():
    batch = make_batch()

    def complaint(model):
        with pytest.raises(UserError) as caught:
            TGAZSR(threat=THREAT, teacher=model, steps=1).perturb(model, batch, SeededDraws(0))
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    class Bare(torch.nn.Module):
        """An image tower that gives no tokens."""

        def __init__(self, tower):
            super().__init__()
            self.tower = tower

        def forward(self, images):
            return self.tower(images)[0], None

    bare = tiny_clip()
    bare.image_tower = Bare(bare.image_tower)
    assert "needs image tokens, and this image tower gives none" in complaint(bare)
    assert "needs an image projection that fits" in complaint(model_with_state())
    odd = ImageState(torch.ones(1, 6, 5), torch.zeros(1, 4), torch.zeros(1, 4))
    with pytest.raises(UserError, match="in a square grid, and this image tower gives 6"):
        place_embeds(torch.nn.Linear(5, 4), odd)


def test_constants_are_the_paper_s():
    defence = TGAZSR(threat=THREAT, teacher=tiny_clip())
    assert defence.weights == {"refinement": 0.08, "constraint": 0.05}
    assert (defence.attack.steps, defence.attack.step_size, defence.trains) == (2, THREAT.eps, ("image",))
