"""From a config's name or path and `key=value` overrides to a checked config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from fastmat.build import Component, sentence
from fastmat.cli.config import Section
from fastmat.errors import UserError, nearest

S = TypeVar("S", bound=Section)


def load_config(schema: type[S], source: str | None, overrides: Sequence[str] = ()) -> S:
    """The config at `source` (a packaged name or a path; None: empty) with `overrides` on top, checked as a whole."""
    values = {} if source is None else read_yaml(source)
    for text in overrides:
        override(values, text)
    return validate(schema, values, source=source or "command line")


def validate(schema: type[S], values: Mapping[str, Any], *, source: str) -> S:
    """Raise UserError, naming `source` and the key, unless `values` fit."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UserError(f"{source}: {where}{': ' if where else ''}{sentence(error)}") from error


def read_yaml(source: str) -> dict[str, Any]:
    """The mapping in a YAML file: one that ships with fastmat, or a path."""
    packaged = resources.files("fastmat.configs") / f"{source}.yaml"
    if packaged.is_file():
        text = packaged.read_text(encoding="utf-8")
    elif Path(source).is_file():
        try:
            text = Path(source).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{source} is not UTF-8 text; save it as UTF-8") from error
    else:
        raise UserError(f"config '{source}' is neither a file nor a shipped config{nearest(source, shipped())}")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{source} must hold keys and values, not {type(values).__name__}")
    return values


def shipped() -> list[str]:
    """Names of the configs that ship with fastmat."""
    files = resources.files("fastmat.configs").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def override(values: dict[str, Any], text: str) -> None:
    """Apply one `dotted.key=value` in place; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override '{text}' must read key=value, such as attack.steps=20")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override '{text}': the value is not YAML: {' '.join(str(error).split())}") from error
    put(values, key, parsed)


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in place, making sections on the way; `attack: sga` becomes a section when a part is set."""
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if isinstance(inner, str):
            inner = values[section] = {"name": inner}
        if not isinstance(inner, dict):
            raise UserError(f"override '{key}': '{section}' is a value, not a section")
        values = inner
    values[last] = value


def plain(value: Any) -> Any:
    """A config as JSON can hold it: what was resolved, ready for a manifest or a results file."""
    if isinstance(value, Section):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Component):
        return plain(value.plain())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
