"""What an adversarial set depends on."""

from pathlib import Path

from fastmat.attacks.engine import Engine
from fastmat.attacks.pgd import PGD
from fastmat.build import Component
from fastmat.cli.making import inputs_of
from fastmat.types import ThreatModel


class OfTheBatch(PGD):
    """Its images depend on their batch."""

    splits = False


def inputs(kind: type[PGD], *, batch_size: int, **arguments: object) -> dict[str, object]:
    attack = kind(threat=ThreatModel())
    component = Component(name="pgd", arguments=arguments)
    return inputs_of(component, attack, engine=Engine(), mlm_sha256=None, seed=0, batch_size=batch_size, fit_on=None)


def test_the_batch_size_is_an_input_of_an_attack_on_batches_alone() -> None:
    assert inputs(PGD, batch_size=2) == inputs(PGD, batch_size=3)
    assert inputs(OfTheBatch, batch_size=2) != inputs(OfTheBatch, batch_size=3)


def test_the_content_of_a_named_file_is_an_input(tmp_path: Path) -> None:
    file = tmp_path / "delta.safetensors"
    file.write_bytes(b"one")
    first = inputs(PGD, batch_size=2, perturbation=str(file))
    assert first == inputs(PGD, batch_size=2, perturbation=str(file))
    inner = inputs(PGD, batch_size=2, candidates={"name": "lexicon", "folders": [{"file": str(file)}]})
    file.write_bytes(b"two")
    assert first != inputs(PGD, batch_size=2, perturbation=str(file))
    assert inner != inputs(PGD, batch_size=2, candidates={"name": "lexicon", "folders": [{"file": str(file)}]})
