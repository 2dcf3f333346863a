"""What may serve as calibration, and corrections on disk."""

from pathlib import Path

import pytest
import torch

from fastmat.alignment.dynamic import Gate
from fastmat.alignment.file import Correction, read_corrections, write_corrections, written_for
from fastmat.alignment.oracle import Oracle
from fastmat.alignment.pairs import Pairs, check_held_out
from fastmat.alignment.static import Affine, Subspace
from fastmat.data.digits import digits_set
from fastmat.errors import UserError
from fastmat.models.weights import save_state


def test_held_out() -> None:
    train, test = digits_set("train").take(20), digits_set("test")
    check_held_out(train, test)
    with pytest.raises(UserError, match="calibration and test are both digits/test"):
        check_held_out(test, test.take(3))
    other = type(train)(
        name="copy", split="any", captions=test.captions, ids=test.ids, group=test.group, load=test.load
    )
    with pytest.raises(UserError, match=r"160 calibration images are test images, the first is 'test-0000'"):
        check_held_out(other, test)


def test_pairs_that_are_none() -> None:
    z = torch.randn(4, 3)
    with pytest.raises(UserError, match="no adversarial calibration pairs for the text projection"):
        Pairs(site="text", clean=z, adversarial=z.clone())
    with pytest.raises(UserError, match="two calibration pairs at least, got 1"):
        Pairs(site="image", clean=z[:1], adversarial=z[:1] + 1)
    with pytest.raises(UserError, match=r"got \(4, 3\) and \(3, 3\)"):
        Pairs(site="image", clean=z, adversarial=z[:3])


def every_kind() -> dict[str, Correction]:
    gate = Gate(width=6, reduction=2, gamma=0.5, unit=3.0, inputs=torch.randn(5, 6))
    gate.offset.weight.data += 0.3
    return {
        "affine": Affine(scale=torch.rand(6), shift=torch.rand(6)),
        "subspace": Subspace(basis=torch.linalg.qr(torch.randn(6, 2)).Q, centre=torch.rand(6)),
        "gate": gate,
        "oracle": Oracle(width=6, basis=torch.linalg.qr(torch.randn(6, 2)).Q),
    }


@pytest.mark.parametrize("kind", ["affine", "subspace", "gate", "oracle"])
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    path, made = tmp_path / "below" / "it.safetensors", every_kind()[kind]
    write_corrections(path, {"image": made, "text": made}, inputs="abc")
    assert written_for(path) == "abc" and written_for(tmp_path / "absent") is None
    found = read_corrections(path, widths={"image": 6, "text": 6})
    assert list(found) == ["image", "text"]
    z = torch.randn(4, 6)
    for module in found.values():
        assert type(module) is type(made)
        if isinstance(module, Oracle):
            made.clean = module.clean = torch.zeros(4, 6)
        assert torch.equal(module(z), made(z))


def test_refused_files(tmp_path: Path) -> None:
    path = tmp_path / "gate.safetensors"
    write_corrections(path, {"image": Gate(width=6)})
    with pytest.raises(
        UserError, match=r"gate\.safetensors corrects 6 channels, but the model's image projection gives 8"
    ):
        read_corrections(path, widths={"image": 8})
    with pytest.raises(UserError, match=r"corrects image, but sites are text"):
        read_corrections(path, widths={"text": 6})
    with pytest.raises(UserError, match="does not exist"):
        read_corrections(tmp_path / "absent", widths={"image": 6})
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_corrections(path, widths={"image": 6})
    save_state({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="holds no corrections"):
        read_corrections(path, widths={"image": 6})
    save_state({"image.scale": torch.zeros(6)}, path, metadata={"sites": {"image": {"kind": "affine", "width": 6}}})
    with pytest.raises(UserError, match=r"gate\.safetensors is damaged"):
        read_corrections(path, widths={"image": 6})
