"""Rows of a comparison as text: a rich table on a terminal, Markdown elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from prune_lab.report import Row, RunResult, Stat
from prune_lab.tracking.lines import duration, quantity, to_ascii


def render(rows: Sequence[Row], runs: Sequence[RunResult], notes: Sequence[str], *, stream: TextIO) -> None:
    """Write the table, how to read it, and every run that is not in it."""
    if rows:
        header, cells = table(rows)
        if stream.isatty():
            _rich(header, cells, stream)
        else:
            stream.write(markdown(header, cells))
        stream.write("\nmean +- sample standard deviation over n finished runs; ratios are to the dense network\n")
    for line in [*unfinished(runs), *notes]:
        stream.write(to_ascii(line) + "\n")


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return column names and ASCII cells; a column that no row fills is left out."""
    columns = {
        "method": [row.labels[0] for row in rows],
        "model": [row.labels[1] for row in rows],
        "dataset": [row.labels[2] for row in rows],
        "schedule": [row.labels[3] for row in rows],
        "sparsity": ["" if row.sparsity is None else f"{row.sparsity:g}" for row in rows],
        "matched": [row.matched for row in rows],
        "options": [row.options for row in rows],
        "control": [row.control for row in rows],
        "n": [_count(row) for row in rows],
        "top-1 %": [_spread(row.stats.get("top1"), "{:.2f}") for row in rows],
        "test top-1 %": [_spread(row.stats.get("test"), "{:.2f}") for row in rows],
        "delta to dense": [_spread(row.stats.get("delta"), "{:+.2f}") for row in rows],
        "delta to method": [_spread(row.stats.get("control"), "{:+.2f}") for row in rows],
        "params nonzero": [_params(row) for row in rows],
        "MACs ratio": [_mean(row.stats.get("macs"), "{:.4f}") for row in rows],
        "train MACs ratio": [_mean(row.stats.get("train"), "{:.3f}") for row in rows],
        "wall time": [duration(row.stats["wall"].mean) if "wall" in row.stats else "" for row in rows],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [[to_ascii(cell) or "-" for cell in line] for line in zip(*kept.values(), strict=True)]
    return list(kept), lines


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with columns as wide as their widest cell."""
    lines = [header, *[[cell.replace("|", "\\|") for cell in line] for line in cells]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    text = ""
    for line in [header, rule, *lines[1:]]:
        text += "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
    return text


def unfinished(runs: Sequence[RunResult]) -> list[str]:
    """Return a line for every run without results; `running` may also mean killed."""
    left = [run for run in runs if not run.summary]
    words = {"running": "running or killed"}
    lines = [f"not finished, {len(left)} of {len(runs)} runs:"] if left else []
    for run in left:
        lines.append(f"  {words.get(run.status, run.status)}: {run.path}" + (f" ({run.error})" if run.error else ""))
    return lines


def _rich(header: Sequence[str], cells: Sequence[Sequence[str]], stream: TextIO) -> None:
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


def _count(row: Row) -> str:
    return str(row.num_finished) if row.num_finished == row.num_runs else f"{row.num_finished} of {row.num_runs}"


def _spread(stat: Stat | None, form: str) -> str:
    if stat is None:
        return ""
    return form.format(stat.mean) + ("" if stat.std is None else f" +- {stat.std:.2f}")


def _mean(stat: Stat | None, form: str) -> str:
    return "" if stat is None else form.format(stat.mean)


def _params(row: Row) -> str:
    count, ratio = row.stats.get("params"), row.stats.get("params_ratio")
    if count is None:
        return ""
    return quantity(count.mean) + ("" if ratio is None else f" ({ratio.mean:.1%})")
