"""The report: one HTML file with table, remarks and interactive plots that needs no network and loads nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from prune_lab.commands.compare import styles
from prune_lab.commands.compare.figures import SPREAD, Figure, Figures
from prune_lab.commands.compare.groups import Row
from prune_lab.commands.compare.table import Findings, published_table, table
from prune_lab.foundations.files import write_text
from prune_lab.foundations.schema import ConfigError

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
"""the browser itself refuses every request to anywhere, whatever a run's texts may hold"""
_UNITS = {"s": 1, "min": 60, "h": 3600, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}

_LONG = 30
"""characters that a cell takes in one line"""
_COURSE = (
    f"Means over a row's runs after each epoch and each pruning, as the runs recorded them. Bands are {SPREAD}. Rows "
    "without a mask have no line. What is counted from the beginning of a phase starts anew in the next one."
)


def write_report(
    rows: Sequence[Row], findings: Findings, figures: Figures, notes: Sequence[str], path: Path
) -> None:
    """Write the report to `path`; the same input gives the same bytes.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page(rows, findings, figures, notes))
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be written ({error.strerror or error})") from error


def page(rows: Sequence[Row], findings: Findings, figures: Figures, notes: Sequence[str]) -> str:
    """Return the whole report as text."""
    from plotly.offline import get_plotlyjs

    about = _about(rows)
    body = [
        f"<h1>Comparison of {len(rows)} {'row' if len(rows) == 1 else 'rows'} of runs</h1>",
        *(f"<p>{escape(line)}</p>" for line in about),
        "<h2>Results</h2>",
        _grid(*table(rows, findings), "results"),
        _lines([*notes, *figures.notes]),
        _published(findings),
        _plots(figures),
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            "<title>prune-lab: comparison of runs</title>",
            f"<style>\n{_asset('report.css')}</style>\n</head>\n<body>\n<main>",
            *filter(None, body),
            "</main>",
            f'<script type="application/json" id="data">{_json(figures)}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>\n{_asset('report.js')}</script>\n</body>\n</html>\n",
        ]
    )


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


def _grid(header: Sequence[str], cells: Sequence[Sequence[str]], name: str) -> str:
    """Return a table whose columns sort on a click; columns of numbers are aligned to the right."""
    columns = list(zip(*cells, strict=True))
    kinds = [_kind(column) for column in columns]
    head = "".join(
        f'<th scope="col" class="{kind}"><button type="button">{escape(text)}</button></th>'
        for text, kind in zip(header, kinds, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(_cell(text, kind) for text, kind in zip(line, kinds, strict=True)) + "</tr>"
        for line in cells
    )
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">\n<table>\n<thead><tr>{head}'
            f"</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>")  # fmt: skip


def _kind(column: Sequence[str]) -> str:
    """Return how a column is set: num, long (wrapped) or text."""
    if all(cell == "-" or sort_value(cell) is not None for cell in column):
        return "num"
    return "long" if max(map(len, column)) > _LONG else "text"


def _cell(text: str, kind: str) -> str:
    if kind != "num":
        return f'<td class="{kind}">{escape(text)}</td>'
    value = sort_value(text)
    known = "" if value is None else f' data-value="{value:.12g}"'
    return f'<td class="num"{known}>{escape(text).replace("+-", "&plusmn;")}</td>'


def sort_value(cell: str) -> float | None:
    """Return the number that a cell begins with, units considered (13.1 k, 2 min 03 s); None: it does not."""
    times = re.match(r"([\d.]+) (h|min|s)\b(?: (\d+) (min|s)\b)?", cell)
    if times:
        return sum(float(count) * _UNITS[unit] for count, unit in (times.groups()[:2], times.groups()[2:]) if count)
    found = re.match(r"([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?: ([kMGTPE])\b)?(?=$|[\s(])", cell)
    return float(found[1]) * _UNITS.get(found[2], 1) if found else None


def _lines(notes: Sequence[str]) -> str:
    items = "\n".join(f'<li{_indent(note)}>{escape(note.strip())}</li>' for note in notes)
    return f'<ul class="notes">\n{items}\n</ul>' if notes else ""


def _indent(note: str) -> str:
    return ' class="inner"' if note.startswith(" ") else ""


def _published(findings: Findings) -> str:
    if not findings.published:
        return ""
    header, cells, remarks = published_table(findings.published)
    grid = _grid(header, cells, "published numbers")
    return f"<h2>Published numbers beside those here</h2>\n{grid}\n{_lines(remarks)}"


def _plots(figures: Figures) -> str:
    """Return the places of the plots with what is said about them; a script fills them."""
    if not figures.figures:
        return ""
    large = [_plot(figure) for figure in figures.figures if not figure.small]
    small = [figure for figure in figures.figures if figure.small]
    options = "".join(f"<option>{escape(name)}</option>" for name in figures.datasets)
    choice = f'<p><label>Data set <select id="dataset">{options}</select></label></p>'
    parts = ["<h2>Figures</h2>", "<noscript><p>The figures need JavaScript.</p></noscript>",
             choice if len(figures.datasets) > 1 else "", *large]  # fmt: skip
    if small:
        parts += [
            '<section class="card" data-legend>\n<h3>Sparsity and masks in the course of training</h3>',
            '<div class="small">', *map(_small_plot, small), "</div>",
            '<div class="legend"></div>',
            f"<p>{escape(_COURSE)}</p>\n</section>",
        ]  # fmt: skip
    return "\n".join(filter(None, parts))


def _plot(figure: Figure) -> str:
    title = escape(figure.title)
    return (f'<figure class="card" data-legend>\n<h3>{title}</h3>\n'
            f'<p class="choice"><label>{escape(figure.selector)} <select data-for="{escape(figure.key)}"></select>'
            f'</label></p>\n{_place(figure)}\n'
            f'<div class="legend"></div>\n<figcaption>{escape(figure.caption)}</figcaption>\n</figure>')  # fmt: skip


def _small_plot(figure: Figure) -> str:
    title = escape(figure.title)
    return f"<figure>\n<h4>{title}</h4>\n{_place(figure)}\n<figcaption>{escape(figure.caption)}</figcaption>\n</figure>"


def _place(figure: Figure) -> str:
    key, title = escape(figure.key), escape(figure.title)
    return f'<div class="plot" data-figure="{key}" role="img" aria-label="{title}"></div>'


def _json(figures: Figures) -> str:
    """Return what the script draws from as JSON that cannot end the script element it stands in."""
    content = {
        "light": styles.LIGHT,
        "dark": styles.DARK,
        "symbols": styles.SYMBOLS,
        "dashes": styles.DASHES,
        "figures": [asdict(figure) for figure in figures.figures],
    }
    text = json.dumps(_short(content), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _short(value: Any) -> Any:
    """Return `value` with numbers of seven digits, more than a picture shows."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _short(entry) for key, entry in value.items()}
    return [_short(entry) for entry in value] if isinstance(value, (list, tuple)) else value
