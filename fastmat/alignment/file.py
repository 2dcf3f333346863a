"""Corrections on disk: one safetensors file for all sites of a model, with what each is and its width."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastmat.alignment.corrected import check_widths
from fastmat.alignment.dynamic import Gate
from fastmat.alignment.oracle import Oracle
from fastmat.alignment.static import Affine, Subspace
from fastmat.errors import UserError
from fastmat.models.weights import save_state

Correction = Affine | Subspace | Gate | Oracle


def write_corrections(path: Path, corrections: Mapping[str, Correction], *, inputs: str = "") -> None:
    """The file appears whole or not at all. inputs: sha256 of all that the corrections depend on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{site}.{name}": value.clone()  # two sites may share a module, a file shares nothing
        for site, module in corrections.items()
        for name, value in module.state_dict().items()
    }
    told = {site: described(module) for site, module in corrections.items()}
    save_state(tensors, path, metadata={"sites": told, "inputs": inputs})


def described(correction: Correction) -> dict[str, Any]:
    about: dict[str, Any] = {"kind": type(correction).__name__.lower(), "width": correction.width}
    if isinstance(correction, Gate):
        about |= {"reduction": correction.reduction, "gamma": correction.gamma}
    return about


def written_for(path: Path) -> str | None:
    """The `inputs` of a file; None where there is no such file."""
    return None if not path.exists() else str(_read(path)[0].get("inputs", ""))


def read_corrections(path: Path, *, widths: Mapping[str, int]) -> dict[str, Correction]:
    """Corrections by site. widths: by site, of the model's features.

    Raises UserError naming the file where it is missing, damaged, none of corrections, for a site that `widths` lacks
    or for another width.
    """
    about, tensors = _read(path)
    sites = about.get("sites")
    if not isinstance(sites, dict) or not sites:
        raise UserError(f"{path} holds no corrections; fastmat study channel-alignment writes such files")
    absent = [site for site in sites if site not in widths]
    if absent:
        raise UserError(f"{path} corrects {', '.join(absent)}, but sites are {', '.join(widths)}; set sites to match")
    made = {}
    for site, told in sites.items():
        state = {name.removeprefix(f"{site}."): t for name, t in tensors.items() if name.startswith(f"{site}.")}
        try:
            made[site] = _module(told, state)
        except (KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}); make or copy it again") from error
    check_widths(made, widths, source=str(path))
    return made


def _module(told: Mapping[str, Any], state: Mapping[str, Tensor]) -> Correction:
    if told["kind"] == "affine":
        return Affine(scale=state["scale"], shift=state["shift"])
    if told["kind"] == "subspace":
        return Subspace(basis=state["basis"], centre=state["centre"])
    if told["kind"] == "oracle":
        return Oracle(width=told["width"], basis=state.get("basis"))
    if told["kind"] != "gate":
        raise KeyError(f"kind {told['kind']}")
    gate = Gate(width=told["width"], reduction=told["reduction"], gamma=told["gamma"], inputs=state.get("inputs"))
    gate.load_state_dict(dict(state))
    return gate.eval().requires_grad_(False)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise UserError(f"corrections file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("fastmat", "{}"))
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); make or copy it again") from error
