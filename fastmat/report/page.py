"""What every page of a report shares: its style, and that every text out of the data is escaped."""

from __future__ import annotations

from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from fastmat.report.labels import attack_name, marked_words, radius, victim_name


def page(name: str) -> Template:
    """The template `<name>.html.jinja` beside this file: texts are not trusted, and a missing value is an error."""
    environment = Environment(
        loader=PackageLoader("fastmat.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"attack_name": attack_name, "victim_name": victim_name}
    environment.globals |= {
        "marked_words": marked_words,
        "radius": radius,
        "style": resources.files("fastmat.report").joinpath("style.css").read_text(),
    }
    return environment.get_template(f"{name}.html.jinja")
