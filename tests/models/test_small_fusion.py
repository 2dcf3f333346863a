"""The small fusion model keeps the protocol, and learns to match where a larger one would wait."""

import torch

from fastmat.data.digits import digits_set
from fastmat.data.loader import evaluation_batches
from fastmat.models.protocol import FusionModel, fuses
from fastmat.models.small_fusion import small_fusion


def test_states_and_both_ways_to_match() -> None:
    model = small_fusion(vocabulary=["a", "red", "dog", "blue"], widths=(8, 16), width=16, heads=2).eval()
    assert isinstance(model, FusionModel) and fuses(model) and not model.ranks_with_cosine
    before = torch.get_rng_state()
    other = small_fusion(vocabulary=["a", "red", "dog", "blue"], widths=(8, 16), width=16, heads=2).eval()
    assert torch.equal(before, torch.get_rng_state())
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = ("a red dog", "a dog", "blue blue unheard of")
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(model.tokenize(texts))
        assert image.tokens is not None and image.tokens.shape == (3, 1 + 64, 16) and text.tokens is not None
        assert torch.equal(image.features, other.encode_image(images).features)
        assert torch.allclose(image.features.norm(dim=1), torch.ones(3))
        fused = model.fuse(image, text, torch.tensor([0, 0, 2])).itm_logits
        packed = model.pack_texts(text)
        for row, owner in enumerate((0, 0, 2)):
            keys = model.image_keys(image.tokens[owner][None])
            assert torch.allclose(model.match(keys, packed.take(torch.tensor([row])))[0], fused[row], atol=1e-5)
        alone = model.encode_text(model.tokenize(texts[1:2]))
    assert torch.allclose(alone.features[0], text.features[1], atol=1e-5), "padding changes nothing"


def test_learns_to_match_a_few_pairs() -> None:
    data = digits_set("val").take(6)
    (batch,) = evaluation_batches(data, small_fusion(vocabulary=None).image_transform, batch_size=6)
    words = sorted({word for text in batch.texts for word in text.split()})
    model = small_fusion(vocabulary=words, widths=(8, 16), width=32, fusion_layers=1)
    own = batch.group[:, None] == batch.text_group
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(len(batch.texts)))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    accuracy = []
    for _ in range(40):
        image, text = model.encode_image(batch.images), model.encode_text(model.tokenize(batch.texts))
        part = type(text)(*(each[pairs[:, 1]] for each in text))
        logits = model.fuse(image, part, pairs[:, 0]).itm_logits
        weight = torch.tensor([1 / 5, 1.0])  # one text in six is an image's own
        loss = torch.nn.functional.cross_entropy(logits, own.flatten().long(), weight)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        right = (logits.argmax(1) == own.flatten()).double()
        accuracy.append(float((right[own.flatten()].mean() + right[~own.flatten()].mean()) / 2))
    assert accuracy[-1] > 0.9, accuracy
