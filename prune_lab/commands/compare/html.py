"""The report: one HTML file with table, remarks and interactive plots that needs no network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prune_lab.commands.compare import styles
from prune_lab.commands.compare.figures import SPREAD, Figures
from prune_lab.commands.compare.groups import Row
from prune_lab.commands.compare.table import Findings, published_table, table
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import write_text

_UNITS = {"s": 1, "min": 60, "h": 3600, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}

_LONG = 30
"""characters that fit into one line of a cell"""


def write_report(
    rows: Sequence[Row], findings: Findings, figures: Figures, notes: Sequence[str], path: Path
) -> None:
    """Write the report to `path`; the same input gives the same bytes.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page(rows, findings, figures, notes))
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror or error})") from error


def page(rows: Sequence[Row], findings: Findings, figures: Figures, notes: Sequence[str]) -> str:
    """Return the whole report as text."""
    from plotly.offline import get_plotlyjs

    header, cells, remarks = published_table(findings.published)
    return _render(
        num_rows=len(rows),
        about=_about(rows),
        results=_grid(*table(rows, findings)),
        notes=[*notes, *figures.notes],
        published=_grid(header, cells) if cells else None,
        remarks=remarks,
        figures=figures.figures,
        datasets=figures.datasets,
        spread=SPREAD,
        data=_data(figures),
        css=_asset("report.css"),
        script=_asset("report.js"),
        plotly=get_plotlyjs(),
    )


def _render(**content: Any) -> str:
    """Return the template report.html with `content`, whose texts are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template("report.html").render(content)


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _about(rows: Sequence[Row]) -> list[str]:
    runs = sum(row.num_runs for row in rows)
    finished = sum(row.num_finished for row in rows)
    lines = [f"{finished} finished of {runs} {'run' if runs == 1 else 'runs'}. A row holds the runs that differ in "
             "nothing but the seed."]  # fmt: skip
    for position, name in enumerate(("Methods", "Models", "Data sets", "Schedules")):
        lines.append(f"{name}: {', '.join(sorted({row.labels[position] for row in rows}))}")
    return lines


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return a table's titles with the kinds of their columns, and its cells with their sort values."""
    kinds = [_kind(column) for column in zip(*lines, strict=True)]
    cells = [
        [(text, kind, sort_value(text) if kind == "num" else None) for text, kind in zip(line, kinds, strict=True)]
        for line in lines
    ]
    return {"header": list(zip(header, kinds, strict=True)), "lines": cells}


def _kind(column: Sequence[str]) -> str:
    """Return how a column is formatted: num, long (wrapped) or text."""
    if all(cell == "-" or sort_value(cell) is not None for cell in column):
        return "num"
    return "long" if max(map(len, column)) > _LONG else "text"


def sort_value(cell: str) -> float | None:
    """Return the number at the beginning of a cell, including its unit (13.1 k, 2 min 03 s); None: there is none."""
    times = re.match(r"([\d.]+) (h|min|s)\b(?: (\d+) (min|s)\b)?", cell)
    if times:
        return sum(float(count) * _UNITS[unit] for count, unit in (times.groups()[:2], times.groups()[2:]) if count)
    found = re.match(r"([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?: ([kMGTPE])\b)?(?=$|[\s(])", cell)
    return float(found[1]) * _UNITS.get(found[2], 1) if found else None


def _data(figures: Figures) -> dict[str, Any]:
    """Return the input data of the script."""
    content = {
        "light": styles.LIGHT,
        "dark": styles.DARK,
        "symbols": styles.SYMBOLS,
        "dashes": styles.DASHES,
        "figures": [asdict(figure) for figure in figures.figures],
    }
    return _short(content)


def _short(value: Any) -> Any:
    """Return `value` with numbers rounded to seven digits, more than a picture shows."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _short(entry) for key, entry in value.items()}
    return [_short(entry) for entry in value] if isinstance(value, (list, tuple)) else value
