"""The files of a finished evaluation: results.json, results.md, results.html and eval.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from searchr1.evaluation.page import page
from searchr1.evaluation.results import Results
from searchr1.evaluation.summary import flat_metrics
from searchr1.evaluation.tables import Table, markdown
from searchr1.files.atomic import write_text


def write_results(folder: Path, results: Results) -> dict[str, float]:
    """Write the four files; return what `eval.json` holds."""
    metrics = flat_metrics(results.main)
    write_text(folder / "results.json", _json(results.json()))
    write_text(folder / "results.md", _document(results))
    write_text(folder / "results.html", page(results))
    write_text(folder / "eval.json", _json(metrics))
    return metrics


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _document(results: Results) -> str:
    settings = markdown(Table("Settings", ["", ""], [[name, value] for name, value in results.settings.items()]))
    return "\n".join([f"# Evaluation of {Path(results.model).name}", "", *map(markdown, results.tables()), settings])
