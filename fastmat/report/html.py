"""`results.json` and `examples.json` to one HTML file that needs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastmat.evaluation.results import Examples, Results, read_examples, read_results, write_atomic
from fastmat.report.matrix import matrices
from fastmat.report.page import page
from fastmat.report.perturbations import perturbation_drops
from fastmat.report.plots import attacks_plot, eps_plot, training_plot
from fastmat.report.tables import COLUMNS, tables
from fastmat.report.truths import truth_tables


def write_report(folder: Path) -> Path:
    """`folder/report.html` of `folder/results.json` and, where there is one, `folder/examples.json`.

    Written as a whole or not at all. Raises UserError when a file is missing or does not follow its schema.
    """
    results = read_results(folder / "results.json")
    path = folder / "examples.json"
    examples = read_examples(path) if path.exists() else Examples(chosen="", examples=[])
    return write_atomic(folder / "report.html", render(results, examples).encode())


def render(results: Results, examples: Examples) -> str:
    """The page. Every text out of the data is escaped: captions and names are not trusted."""
    made = tables(results.rows)
    return page("report").render(
        tables=made,
        columns=COLUMNS,
        matrices=[matrices(table.rows) for table in made],
        truths=[truth_tables(table.rows) for table in made],
        drops=[perturbation_drops(table.rows, results.config) for table in made],
        plots=[{"attacks": attacks_plot(table.rows), "eps": eps_plot(table.rows)} for table in made],
        training=training_plot(results.training),
        examples=examples,
        config=pretty(results.config),
        environment=results.environment,
    )


def pretty(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
