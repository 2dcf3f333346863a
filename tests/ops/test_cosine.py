from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.tolerances import TOLERANCES
from torch import Tensor

from fastmat.errors import UserError
from fastmat.ops import cosine as module
from fastmat.ops import cosine_to_set

# Images, captions, features, and each caption's image.
CASES = {
    "one": (1, 1, 1, [0]),
    "ragged, one image without captions": (4, 7, 5, [3, 0, 0, 3, 3, 1, 0]),
    "all of one image": (3, 17, 33, [1] * 17),
    "one each": (5, 5, 16, [4, 3, 2, 1, 0]),
    "around a block": (2, 33, 31, [t % 2 for t in range(33)]),
}
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def features(rows: int, width: int, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    draw = torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(draw, dim=-1).to(device, dtype)


def label_loop(image: Tensor, text: Tensor, txt2img: list[int]) -> list[float]:
    """The published code's way: the whole matrix, and a label for every pair."""
    matrix = (image.double() @ text.double().T).tolist()
    return [sum(matrix[i][t] for t in range(len(txt2img)) if txt2img[t] == i) for i in range(len(image))]


@pytest.mark.parametrize("dtypes", [(a, b) for a in FLOATS for b in FLOATS if a is b or torch.float32 in (a, b)])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(
    case: str, dtypes: tuple[torch.dtype, torch.dtype], backend: str, device: torch.device
) -> None:
    images, texts, width, own = CASES[case]
    image = features(images, width, 0, dtypes[0], device).requires_grad_()
    text = features(texts, width, 1, dtypes[1], device).requires_grad_()
    value = cosine_to_set(image, text, torch.tensor(own, device=device), backend=backend)
    accumulated = torch.float64 if torch.float64 in dtypes else torch.float32
    assert value.dtype is accumulated
    want = torch.tensor(label_loop(image, text, own), dtype=accumulated, device=device)
    torch.testing.assert_close(value, want, **TOLERANCES[accumulated])
    weight = torch.linspace(0.5, 2, images, dtype=accumulated, device=device)
    of_image, of_text = torch.autograd.grad(value, (image, text), weight)
    seed = torch.zeros(images, width, dtype=torch.float64, device=device)
    for t, i in enumerate(own):
        seed[i] += text[t].detach().double()
    torch.testing.assert_close(of_image, (weight[:, None] * seed).to(dtypes[0]), **TOLERANCES[dtypes[0]])
    torch.testing.assert_close(
        of_text, (weight[:, None] * image.detach().double())[own].to(dtypes[1]), **TOLERANCES[dtypes[1]]
    )


def test_first_and_second_gradients(backend: str, device: torch.device) -> None:
    image = features(3, 4, 0, torch.float64, device).requires_grad_()
    text = features(5, 4, 1, torch.float64, device).requires_grad_()
    txt2img = torch.tensor([0, 0, 2, 2, 0], device=device)

    def value(image: Tensor, text: Tensor) -> Tensor:
        return cosine_to_set(image, text, txt2img, backend=backend)

    assert torch.autograd.gradcheck(value, (image, text))
    assert torch.autograd.gradgradcheck(value, (image, text))


def test_a_penalty_on_the_gradient_beside_the_value(backend: str, device: torch.device) -> None:
    """The seed then receives from the value and from the gradient at once."""
    image = features(3, 4, 0, torch.float64, device).requires_grad_()
    text = features(5, 4, 1, torch.float64, device).requires_grad_()
    txt2img = torch.tensor([0, 0, 2, 2, 0], device=device)
    own = F.one_hot(txt2img, 3).double()

    def penalised(value: Tensor) -> tuple[Tensor, ...]:
        (slope,) = torch.autograd.grad(value.square().sum(), image, create_graph=True)
        return torch.autograd.grad(value.sum() + slope.pow(3).sum(), (image, text))

    got = penalised(cosine_to_set(image, text, txt2img, backend=backend))
    for ours, plain in zip(got, penalised(((image @ text.T) * own.T).sum(1)), strict=True):
        torch.testing.assert_close(ours, plain, **TOLERANCES[torch.float64])


@pytest.mark.parametrize(("images", "texts", "width"), [(0, 0, 4), (3, 0, 4), (2, 3, 0)])
def test_empty(images: int, texts: int, width: int, backend: str, device: torch.device) -> None:
    image = torch.ones(images, width, device=device, requires_grad=True)
    text = torch.ones(texts, width, device=device, requires_grad=True)
    value = cosine_to_set(image, text, torch.zeros(texts, dtype=torch.int64, device=device), backend=backend)
    assert value.tolist() == [0.0] * images
    of_image, of_text = torch.autograd.grad(value.sum(), (image, text))
    assert of_image.shape == image.shape and of_text.shape == text.shape and not of_image.any() and not of_text.any()


def test_strides_of_any_kind(backend: str, device: torch.device) -> None:
    image = features(6, 4, 0, torch.float32, device).T
    text = features(12, 7, 1, torch.float32, device)[::2].T
    txt2img = (torch.arange(14, device=device) % 4)[::2]
    got = cosine_to_set(image, text, txt2img, backend=backend)
    want = torch.tensor(label_loop(image, text, txt2img.tolist()), device=device)
    torch.testing.assert_close(got, want, **TOLERANCES[torch.float32])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), images=st.integers(1, 5), width=st.integers(1, 40))
def test_the_order_of_captions_does_not_matter_and_they_add_up(backend, device, data, images, width) -> None:
    own = data.draw(st.lists(st.integers(0, images - 1), max_size=20))
    order = data.draw(st.permutations(range(len(own))))
    image = features(images, width, 0, torch.float32, device)
    text = features(len(own), width, 1, torch.float32, device)

    def value(captions: list[int]) -> Tensor:
        txt2img = torch.tensor([own[t] for t in captions], dtype=torch.int64, device=device)
        return cosine_to_set(image, text[captions], txt2img, backend=backend)

    whole, half = value(list(range(len(own)))), len(own) // 2
    torch.testing.assert_close(value(order), whole, **TOLERANCES[torch.float32])
    torch.testing.assert_close(value(order[:half]) + value(order[half:]), whole, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("block_t", [1, 4, 64])
@pytest.mark.parametrize("block_e", [8, 64])
def test_kernel_in_any_block_size_leaves_out_foreign_ids(block_t: int, block_e: int, device: torch.device) -> None:
    pytest.importorskip("triton")
    from fastmat.kernels.cosine import launch_cosine_to_set

    image, text = features(3, 11, 0, torch.float32, device), features(7, 11, 1, torch.float32, device)
    value, seed = torch.full((3,), torch.nan, device=device), torch.full((3, 11), torch.nan, device=device)
    own = torch.tensor([2, 0, -1, 2, 9, 0, 3], device=device)
    launch_cosine_to_set(image, text, own, value, seed, block_t=block_t, block_e=block_e)
    want = torch.stack([text[1] + text[5], torch.zeros_like(text[0]), text[0] + text[3]])
    torch.testing.assert_close(seed, want, **TOLERANCES[torch.float32])
    torch.testing.assert_close(value, (image * want).sum(1), **TOLERANCES[torch.float32])


def test_a_caption_of_no_image_counts_nowhere(device: torch.device) -> None:
    """Where ids are not looked at, on a GPU: in the reference and in the backward, which both backends share."""
    image, text = features(3, 11, 0, torch.float32, device), features(7, 11, 1, torch.float32, device)
    own = torch.tensor([2, 0, -1, 2, 9, 0, 3], device=device)
    want = torch.stack([text[1] + text[5], torch.zeros_like(text[0]), text[0] + text[3]])
    value, seed = module.cosine_to_set_reference(image, text, own)
    torch.testing.assert_close(seed, want, **TOLERANCES[torch.float32])
    torch.testing.assert_close(value, (image * want).sum(1), **TOLERANCES[torch.float32])
    context = SimpleNamespace(saved_tensors=(image, own, seed), needs_input_grad=(True, True), text_dtype=torch.float32)
    _, of_text, _, _ = module._backward(context, torch.ones(3, device=device), None)
    assert of_text is not None
    assert of_text.any(1).tolist() == [True, True, False, True, False, True, False]


def test_a_caption_that_is_not_finite_spoils_its_own_image_only(backend: str, device: torch.device) -> None:
    text = torch.ones(3, 4, device=device)
    text[1] = torch.nan
    value = cosine_to_set(
        torch.ones(3, 4, device=device), text, torch.tensor([0, 1, 2], device=device), backend=backend
    )
    assert value.isnan().tolist() == [False, True, False]


def test_fp32_inside_autocast_and_the_same_in_every_run(backend: str, device: torch.device) -> None:
    image, text = features(4, 64, 0, torch.float32, device), features(20, 64, 1, torch.float32, device)
    txt2img = torch.arange(20, device=device) % 4
    plain = cosine_to_set(image, text, txt2img, backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        inside = cosine_to_set(image, text, txt2img, backend=backend)
    assert torch.equal(plain, inside) and torch.equal(plain, cosine_to_set(image, text, txt2img, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    image, text = features(3, 4, 0, torch.float32, device).requires_grad_(), features(5, 4, 1, dtype, device)
    txt2img = torch.tensor([0, 0, 2, 2, 0], device=device)
    torch.library.opcheck(torch.ops.fastmat.cosine_to_set.default, (image, text.requires_grad_(), txt2img, backend))


def test_compiles_without_a_graph_break(backend: str, device: torch.device) -> None:
    image = features(3, 4, 0, torch.float32, device).requires_grad_()
    text, txt2img = features(5, 4, 1, torch.float32, device), torch.tensor([0, 0, 2, 2, 0], device=device)

    def loss(image: Tensor) -> Tensor:
        return cosine_to_set(image, text, txt2img, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(image), image)[0] for f in (compiled, loss))
    torch.testing.assert_close(got, want)


IMAGE, TEXT, OWN = torch.zeros(2, 4), torch.zeros(3, 4), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("image_features", {"image_features": IMAGE.long()}),
        ("image_features", {"image_features": IMAGE[0]}),
        ("text_features", {"text_features": TEXT.bool()}),
        ("text_features", {"text_features": TEXT[None]}),
        ("text_features", {"text_features": TEXT[:, :3]}),
        ("text_features", {"text_features": TEXT.to("meta")}),
        ("txt2img", {"txt2img": OWN.int()}),
        ("txt2img", {"txt2img": OWN[:2]}),
        ("txt2img", {"txt2img": OWN[None]}),
        ("txt2img", {"txt2img": OWN.to("meta")}),
        ("txt2img", {"txt2img": OWN + 1}),
        ("txt2img", {"txt2img": OWN - 1}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_bad_input_is_named(named: str, change: dict) -> None:
    arguments = {"image_features": IMAGE, "text_features": TEXT, "txt2img": OWN} | change
    with pytest.raises(UserError, match=named):
        cosine_to_set(**arguments)
