"""The help of a command's config keys, read from its schema and from the signatures of what it may name."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic_core import PydanticUndefined

from fastmat import quirks
from fastmat.build import CANDIDATES, GUARDS, OBJECTIVES, SEAMS, TEXT_SEARCHES, Component, locate, parameters_of
from fastmat.cli.config import Fields, OneOf, Section
from fastmat.defences.inner import TextSearch
from fastmat.text.candidates import CandidateSource

WIDTH = 100
GIVEN = {TextSearch: "word_substitution", CandidateSource: "masked"}  # what `fastmat.build.given_of` makes


def describe(schema: type[Section]) -> str:
    """Every key with type, default and meaning; then every component with its arguments and its own words."""
    lines = ["config keys (in the YAML file, key=value on top; floats may be fractions such as 2/255):", ""]
    registries: list[OneOf] = []
    explained: list[Fields] = []
    for key, annotation, default, meaning in keys_of(schema):
        lines += wrapped(f"{key}: {type_name(annotation)}{default_text(default)}", 2)
        lines += wrapped(meaning, 6)
        marks = list(marks_of(annotation))
        for mark in marks:
            if isinstance(mark, OneOf) and all(mark.title != other.title for other in registries):
                registries.append(mark)
        for mark in marks:
            if isinstance(mark, Fields):
                for line in arguments_of(mark.factory, prefix=f"{key}.", run_seed=True):
                    lines += wrapped(line, 4)
                lines += wrapped(inspect.getdoc(locate(mark.factory)), 6) if mark not in explained else []
                explained.append(mark)
    for registry in registries:
        lines += ["", f"{registry.title}:"]
        for name, factory in registry.registry.items():
            lines += component_help(name, factory, run_seed=registry.title in ("attacks", "defences"))
        if registry.title in ("attacks", "defences"):
            lines += ["  every one of them also takes: parity=correct|official, quirks={name: value}"]
        if registry.title == "models":
            lines += ["  every one of them also takes: weights=FILE, which `fastmat train` wrote"]
        if registry.title == "models" and all(other.title != "guards" for other in registries):
            lines += ["", "guards:"]
            for name, factory in GUARDS.items():
                lines += component_help(name, factory)
    if any(registry.title in ("attacks", "defences") for registry in registries):
        lines += ["", "quirks:", *quirk_help()]
        parts_by_title = {
            "objectives": OBJECTIVES,
            "text searches": TEXT_SEARCHES,
            "candidate sources": CANDIDATES,
        }
        for title, parts in parts_by_title.items():
            lines += ["", f"{title}:"]
            for name, factory in parts.items():
                lines += component_help(name, factory)
    return "\n".join(lines)


def keys_of(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted key, annotation, default, meaning), sections inside sections unrolled."""
    hints = get_type_hints(schema, include_extras=True)
    for name, field in schema.model_fields.items():
        inner = section_in(hints[name])
        yield f"{prefix}{name}", hints[name], field.get_default(call_default_factory=True), field.description or ""
        if inner is not None:
            label = ".LABEL" if get_origin(hints[name]) is dict else ""
            yield from keys_of(inner, f"{prefix}{name}{label}.")


def component_help(name: str, factory: str, *, run_seed: bool = False) -> list[str]:
    """Name, arguments with types and defaults, and the docstring."""
    lines = [f"  {name}"]
    for line in arguments_of(factory, prefix="", run_seed=run_seed):
        lines += wrapped(line, 4)
    return lines + wrapped(inspect.getdoc(locate(factory)), 6)


def quirk_help() -> Iterator[str]:
    """Each quirk with the two values that the table in `fastmat.quirks` gives it."""
    table = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", quirks.__doc__ or "", flags=re.MULTILINE)
    meanings = {name: f"correct: {right}. published: {published} ({where})." for name, right, published, where in table}
    for line in arguments_of("fastmat.quirks:Quirks", prefix=""):
        yield f"  {line}"
        yield from wrapped(meanings[line.partition(":")[0]], 6)


def wrapped(text: str | None, indent: int) -> list[str]:
    """Lines of at most WIDTH; what continues a line, by a deeper indentation or for want of room, hangs below it."""
    entries: list[str] = []
    for line in (text or "").splitlines():
        if line.startswith(" ") and entries:
            entries[-1] += f" {line.lstrip()}"
        else:
            entries.append(line)
    margin = " " * indent
    return [
        line
        for entry in entries
        for line in textwrap.wrap(entry, WIDTH, initial_indent=margin, subsequent_indent=f"{margin}    ") or [""]
    ]


def arguments_of(factory: str, *, prefix: str, run_seed: bool = False) -> list[str]:
    """One line per argument. run_seed: the run hands its own seed to whatever does not set one."""
    lines = []
    for name, (annotation, default) in parameters_of(locate(factory)).items():
        text = default_text(default)
        if annotation in GIVEN and default is inspect.Parameter.empty:
            text = f" = {GIVEN[annotation]}"
        if run_seed and name == "seed":
            text = " = the run's seed"
        lines.append(f"{prefix}{name}: {type_name(annotation)}{text}")
    return lines


def section_in(annotation: Any) -> type[Section] | None:
    """The section inside `X`, `X | None` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_in(part))), None)


def marks_of(annotation: Any) -> Iterator[OneOf | Fields]:
    """The marks at any depth of an annotation."""
    if isinstance(annotation, OneOf | Fields):
        yield annotation
    for part in get_args(annotation):
        yield from marks_of(part)


def type_name(annotation: Any) -> str:
    """As one would write it: `float`, `one of pgd, sga`, `list of float`."""
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        named = next((m for m in marks if isinstance(m, OneOf)), None)
        return f"one of {', '.join(named.registry)}" if named else type_name(inner)
    if isinstance(annotation, type) and annotation in SEAMS:
        return f"one of {', '.join(SEAMS[annotation])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin is dict:
        return f"label: {type_name(arguments[1])}" if arguments[1] is not Any else "section"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {type_name(arguments[0])}"
    if arguments and origin is not None and not str(annotation).startswith("typing.Literal"):
        if type(None) in arguments:
            return " or ".join([*(type_name(a) for a in arguments if a is not type(None)), "null"])
        return str(annotation).replace("typing.", "").replace("collections.abc.", "")
    if arguments:
        return " | ".join(repr(a) for a in arguments)
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def default_text(default: Any) -> str:
    if default is PydanticUndefined or default is inspect.Parameter.empty:
        return " (required)"
    if default in ({}, ()):
        return ""
    if isinstance(default, Component):
        default = default.name
    return f" = {'null' if default is None else fraction_text(default)}"


def fraction_text(value: Any) -> str:
    """Radii and steps up to 32/255 as the multiples of 1/255 they are; 0.2 and 0.4 are others by chance."""
    if isinstance(value, float) and 0 < value < 0.13 and abs(value * 255 - round(value * 255)) < 1e-9:
        return f"{round(value * 255)}/255"
    return str(value)
