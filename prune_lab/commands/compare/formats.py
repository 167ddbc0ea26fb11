"""A table as Markdown, LaTeX or CSV, or drawn on a terminal."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any, TextIO

from prune_lab.commands.compare.groups import COSTS, METRICS, Row, stat_of
from prune_lab.commands.compare.table import Findings

FORMATS = ("rich", "markdown", "latex", "csv")

_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
          "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}  # fmt: skip


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with columns as wide as their widest cell."""
    lines = [header, *[[cell.replace("|", "\\|") for cell in line] for line in cells]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    text = ""
    for line in [header, rule, *lines[1:]]:
        text += "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
    return text


def latex(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a tabular with the rules of the package booktabs; +- becomes a plus-minus sign."""
    lines = [" & ".join(map(_latex, line)) + r" \\" for line in cells]
    rows = "\n".join(lines)
    head = " & ".join(map(_latex, header)) + r" \\"
    return (f"\\begin{{tabular}}{{{'l' * len(header)}}}\n\\toprule\n{head}\n\\midrule\n{rows}\n\\bottomrule\n"
            "\\end{tabular}\n")  # fmt: skip


def _latex(cell: str) -> str:
    escaped = "".join(_LATEX.get(letter, letter) for letter in cell)
    return re.sub(r"(^|(?<=[\s(]))-(?=[\d.])", r"$-$", escaped.replace("+-", r"$\pm$"))


def rich(header: Sequence[str], cells: Sequence[Sequence[str]], stream: TextIO) -> None:
    """Draw the table on a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.ASCII)
    for name in header:
        grid.add_column(name, overflow="fold")
    for line in cells:
        grid.add_row(*(Text(cell) for cell in line))
    Console(file=stream, highlight=False).print(grid)


def comma_separated(rows: Sequence[Row], findings: Findings) -> str:
    """Return every number unrounded, one line per row: mean, std and n of each metric, seeds and directories."""
    keys = dict.fromkeys((*METRICS.values(), *COSTS.values(), "sparsity/achieved"))
    lines = [_record(row, findings, keys) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _record(row: Row, findings: Findings, keys: dict[str, None]) -> dict[str, Any]:
    record: dict[str, Any] = dict(zip(("method", "model", "dataset", "schedule"), row.labels, strict=True))
    record |= {"sparsity": row.sparsity, "matched": row.matched, "options": row.options, "control": row.control,
               "epochs": row.epochs, "images evaluated": row.evaluated, "training images per epoch": row.trained,
               "runs": row.num_runs, "finished": row.num_finished}  # fmt: skip
    for key in keys:
        found = stat_of(row, key)
        record |= {f"{key} {part}": getattr(found, part, None) for part in ("mean", "std", "n")}
    difference = findings.differences.get(row.group)
    if findings.differences:
        record |= {f"difference {part}": getattr(difference, part, None) for part in ("mean", "half_width", "n")}
    record["train MACs over dense row"] = findings.over_dense.get(row.group)
    record["front"] = int(row.group in findings.front)
    for entry in findings.published:
        if entry.row is row:
            record |= {f"paper {entry.key}": entry.published, f"paper {entry.key} std": entry.std,
                       "paper certainty": entry.paper["certainty"], "paper changed": entry.changed}  # fmt: skip
    record |= {"group": row.group, "seeds": " ".join(str(run.seed) for run in row.runs),
               "paths": " ".join(str(run.path) for run in row.runs)}  # fmt: skip
    return record
