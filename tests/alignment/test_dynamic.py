"""Gates against a plain re-writing of their formula; what their controls share with them and what they lack."""

import math

import pytest
import torch

from fastmat.alignment.dynamic import Gate, moved, randomised, size_of, summaries, with_inputs
from fastmat.errors import UserError


def trained(width: int = 12, **more: float) -> Gate:
    """Not at its zero start."""
    gate = Gate(width=width, reduction=3, seed=1, **more)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    for parameter in gate.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return gate


@pytest.mark.parametrize("shape", [(4, 12), (4, 5, 12)])
@torch.no_grad()
def test_the_formula_by_loops(shape: tuple[int, ...]) -> None:
    gate, z = trained(gamma=0.7, unit=2.5), torch.randn(shape)
    w1, b1 = gate.squeeze.weight, gate.squeeze.bias
    w2, b2, w3, b3 = gate.factor.weight, gate.factor.bias, gate.offset.weight, gate.offset.bias
    made = gate(z)
    for i in range(4):
        g = z[i] if z.dim() == 2 else z[i].mean(0)
        g = (g - g.mean()) / torch.sqrt(g.var(correction=0) + 1e-5)
        h = [max(0.0, float(w1[k] @ g + b1[k])) for k in range(4)]
        for c in range(12):
            factor = 1 + 0.7 * math.tanh(sum(float(w2[c, k]) * h[k] for k in range(4)) + float(b2[c]))
            offset = 2.5 * (sum(float(w3[c, k]) * h[k] for k in range(4)) + float(b3[c]))
            assert torch.allclose(made[i, ..., c], z[i, ..., c] * factor + offset, atol=1e-4)


def test_it_begins_as_identity_and_leaves_random_state() -> None:
    before = torch.get_rng_state()
    gate = Gate(width=64)
    assert torch.equal(torch.get_rng_state(), before)
    z = torch.randn(3, 64)
    assert torch.equal(gate(z), z)
    assert gate.squeeze.out_features == 4 and Gate(width=256).squeeze.out_features == 16


def test_a_constant_input_makes_a_static_map_of_as_many_parameters() -> None:
    gate = trained()
    constant = with_inputs(gate, torch.randn(1, 12))
    a, b = torch.randn(3, 12), torch.randn(3, 12)
    # Affine with the same scale for every input: differences of inputs are scaled alike, and additive.
    scale = (constant(a) - constant(b)) / (a - b)
    assert torch.allclose(scale, scale[:1].expand(3, -1), atol=1e-3)
    scale = (gate(a) - gate(b)) / (a - b)
    assert not torch.allclose(scale, scale[:1].expand(3, -1), atol=1e-3)
    count = [sum(p.numel() for p in made.parameters()) for made in (gate, constant)]
    assert count[0] == count[1] == 12 * 4 + 4 + 2 * (4 * 12 + 12)


def test_shuffled_inputs_are_those_of_other_images() -> None:
    gate, bank, z = trained(), torch.randn(2, 12), torch.randn(3, 12)
    made = with_inputs(gate, bank)(z)
    for i in range(3):
        assert torch.allclose(made[i : i + 1], with_inputs(gate, bank[i % 2 : i % 2 + 1])(z[i : i + 1]), atol=1e-6)
    assert gate.inputs is None, "the gate itself stays"
    tokens = torch.randn(3, 5, 12)
    assert with_inputs(gate, summaries(tokens))(tokens).shape == tokens.shape
    assert torch.allclose(with_inputs(gate, summaries(tokens))(tokens), gate(tokens), atol=1e-6)


def test_a_random_gate_moves_as_far() -> None:
    gate, z = trained(), torch.randn(50, 12)
    made = randomised(gate, z, seed=3)
    assert moved(made, z) == pytest.approx(moved(gate, z), rel=1e-2)
    assert not torch.allclose(made(z), gate(z))
    assert torch.equal(made(z), randomised(gate, z, seed=3)(z))
    assert moved(randomised(Gate(width=12), z, seed=3), z) == pytest.approx(0, abs=1e-6)


def test_size_and_refusals() -> None:
    z = torch.randn(6, 5)
    assert size_of(z) == pytest.approx(math.sqrt(sum(float(v) ** 2 for v in z.flatten()) / 30), abs=1e-4)
    with pytest.raises(UserError, match="reduction must be at least 1 and gamma above 0, got 0 and 1"):
        Gate(width=8, reduction=0)
