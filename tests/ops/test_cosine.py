import torch

from fastmat.ops import cosine_to_set


def test_value_and_gradient_against_the_label_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 4, generator=generator, requires_grad=True)
    texts = torch.randn(5, 4, generator=generator)
    txt2img = torch.tensor([0, 0, 2, 2, 2])
    got = cosine_to_set(images, texts, txt2img)
    want = [sum(float(images[i].detach() @ texts[t]) for t in range(5) if txt2img[t] == i) for i in range(3)]
    torch.testing.assert_close(got, torch.tensor(want))
    (gradient,) = torch.autograd.grad(got.sum(), images)
    torch.testing.assert_close(gradient, torch.stack([texts[:2].sum(0), torch.zeros(4), texts[2:].sum(0)]))
