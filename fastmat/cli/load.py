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
        where = ".".join(str(part) for part in error.errors()[0]["loc"] if part != "[key]")
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
    values = from_yaml(text, what=source)
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise UserError(f"{source} {found}; expected keys and values, such as `seed: 0`")
    return values


class UniqueKeys(yaml.SafeLoader):
    """Of two equal keys YAML silently takes the last; here they are a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in written:
            if written.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def from_yaml(text: str, *, what: str) -> Any:
    """The value that `text` writes. Raises UserError, which begins with `what`, when it is not YAML."""
    try:
        return yaml.load(text, Loader=UniqueKeys)
    except RecursionError as error:
        raise UserError(f"{what} is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{what} is not YAML{place}: {problem or ' '.join(str(error).split())}") from error


def shipped() -> list[str]:
    """Names of the configs that ship with fastmat."""
    files = resources.files("fastmat.configs").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def override(values: dict[str, Any], text: str) -> None:
    """Apply one `dotted.key=value` in place; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}' must read key=value, such as attack.steps=20; a config is named by --config")
    put(values, key, from_yaml(value, what=f"override '{text}': the value"))


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
