"""Gates learn what only the input tells, their static control cannot; pairs are made anew in every round."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastmat.alignment.dynamic import Gate, with_inputs
from fastmat.alignment.pairs import Pairs
from fastmat.alignment.training import GateSettings, restoring_loss, train_gates
from fastmat.errors import UserError

SETTINGS = GateSettings(reduction=1, rounds=2, steps=150, batch_size=32, lr=1e-2)


def two_ways(n: int = 128) -> Pairs:
    """Channel 4 moves where channel 0 is large, and only there; what it is when clean does not tell."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(n, 8, generator=generator)
    clean[:, 0] = 3 * torch.tensor([1.0, -1.0]).repeat(n // 2)
    adversarial = clean.clone()
    adversarial[:, 0] *= 1.5
    adversarial[:, 4] += 2 * adversarial[:, 0].sign()
    return Pairs(site="image", clean=clean, adversarial=adversarial)


def test_the_loss_by_loops() -> None:
    found, gate = two_ways(6), Gate(width=8, unit=1.3)
    gate.offset.bias.data += 0.2
    total = sum(
        float(((gate(z[i : i + 1])[0] - found.clean[i]) ** 2).sum()) / 6
        for z in (found.adversarial, found.clean)
        for i in range(6)
    )
    assert float(restoring_loss(gate, found.clean, found.adversarial).detach()) == pytest.approx(total, rel=1e-5)


def test_input_dependence_is_what_is_learnt() -> None:
    """Channel 0 says whether the row is attacked and which way channel 4 went, so a gate can undo both; a map that is
    the same for every row can do little, since the shifts of channel 4 cancel out and clean rows must stay."""
    pairs = two_ways()
    gate, constant = (Gate(width=8, reduction=1, inputs=inputs) for inputs in (None, pairs.clean.mean(0, keepdim=True)))
    before = float(restoring_loss(gate, pairs.clean, pairs.adversarial).detach())
    reached = []
    for made in (gate, constant):
        losses = train_gates({"image": made}, lambda: {"image": pairs}, SETTINGS)
        assert len(losses) == 2
        reached.append(float(restoring_loss(made, pairs.clean, pairs.adversarial)))
        assert not any(p.requires_grad for p in made.parameters()) and not made.training
    assert reached[0] < 0.5 * reached[1] and reached[1] > 0.25 * before


def test_pairs_are_renewed_and_results_repeat() -> None:
    pairs, seen = two_ways(), []

    def train(seed: int) -> Gate:
        gate = Gate(width=8, seed=seed)

        def renew() -> dict[str, Pairs]:
            with torch.no_grad():
                seen.append(float(gate.offset.weight.abs().sum()))
            return {"image": pairs}

        train_gates({"image": gate}, renew, SETTINGS, seed=seed)
        return gate

    first, again, other = train(0), train(0), train(1)
    assert seen[0] == 0 and seen[1] > 0, "the second round sees a trained gate"
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.offset.weight, other.offset.weight)


def test_all_sites_at_once_and_the_itc_term() -> None:
    pairs = two_ways(32)
    texts = F.normalize(torch.randn(32, 8, generator=torch.Generator().manual_seed(3)), dim=-1)
    told = replace(pairs, text_features=texts, group=torch.arange(32))
    tokens = Pairs(site="tokens", clean=pairs.clean[:, None], adversarial=pairs.adversarial[:, None])

    def cosine(gate: Gate) -> float:
        return float((F.normalize(gate(pairs.adversarial), dim=-1) * texts).sum(1).mean())

    found = []
    for itc in (0.0, 3.0):
        gates = {"image": Gate(width=8, reduction=1), "tokens": Gate(width=8, reduction=1)}
        settings = GateSettings(reduction=1, rounds=1, steps=100, batch_size=32, lr=1e-2, itc=itc)
        train_gates(gates, lambda: {"image": told, "tokens": tokens}, settings, logit_scale=10.0)
        found.append(cosine(gates["image"]))
        assert bool(gates["tokens"].offset.weight.any())
    assert found[1] > found[0] + 0.05


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"lr": 0}, "lr must be positive"),
        ({"itc": -1}, "itc must be at least 0"),
    ],
)
def test_refusals(told: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        GateSettings(**told)  # type: ignore[arg-type]


def test_a_bank_is_no_parameter() -> None:
    gate = with_inputs(Gate(width=8), torch.randn(5, 8))
    assert "inputs" in gate.state_dict() and "inputs" not in dict(gate.named_parameters())
