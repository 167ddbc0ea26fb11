"""prune-lab compare: from run directories to tables, plots and a report. Imports no torch."""

from __future__ import annotations

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from prune_lab.commands.arguments import Arguments
from prune_lab.commands.compare import conditions, formats
from prune_lab.commands.compare.differences import differences, find_baselines, over_dense, without_baseline
from prune_lab.commands.compare.front import fronts
from prune_lab.commands.compare.groups import COSTS, SORT_KEYS, Row, aggregate, sort_rows
from prune_lab.commands.compare.published import beside
from prune_lab.commands.compare.runs import RunResult, read_runs, without_copies
from prune_lab.commands.compare.table import Findings, legend, published_table, table, unfinished
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import suggestion
from prune_lab.tracking.lines import to_ascii

_DESCRIPTION = """\
Show runs as a table: a row per set of options, mean and standard deviation over its seeds.

  prune-lab compare outputs
  prune-lab compare outputs --filter method=rigl,static method.sparsity=0.9 --sort top1
  prune-lab compare outputs --baseline method=dense --html report.html --plots figures

Runs that differ in more than the seed are never averaged. Failed and unfinished runs are listed below the table.
Differences, Pareto fronts and training costs over a dense row are of rows of equal model (width included), data,
evaluation and schedule: batch size, and the epochs asked for or trained in all.
A name in --filter, --group and --baseline is a group (method, model, dataset), an option (method.sparsity, seed) or
a result (final/top1); name=a,b takes either value, name!=a all others.
"""


def main(argv: list[str]) -> int:
    """Print the table of the runs named in `argv`; unfinished and failed ones are listed below it.

    Raises:
        UserError: wrong option, or nothing to compare.
    """
    options = _options(argv)
    runs, notes = without_copies(read_runs(options.runs))
    if options.filter:
        runs = conditions.apply(conditions.parse("--filter", options.filter, runs), runs)
    if options.group:
        _check_group(options.group, runs)
    rows = sort_rows(aggregate(runs), options.sort)
    findings = find(rows, runs, options)
    notes = [*legend(rows, findings), *unfinished(runs), *notes] if rows else [*unfinished(runs), *notes]
    _write(rows, findings, notes, options)
    if options.html or options.plots:
        _draw(rows, findings, notes, options)
    return 0


def _options(argv: list[str]) -> Namespace:
    parser = Arguments("compare", _DESCRIPTION)
    parser.formatter_class = RawDescriptionHelpFormatter
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS", help="run directories, folders of them, or patterns")
    add("--filter", nargs="+", action="extend", metavar="NAME=VALUE", help="only runs of which all these hold")
    add("--group", metavar="NAME", help="a table of its own for each value of NAME")
    add("--sort", default="name", metavar="KEY", help=f"one of {', '.join(SORT_KEYS)}")
    add("--baseline", nargs="+", action="extend", metavar="NAME=VALUE",
        help="differences to the row of which these hold, paired over seeds; of equal model (width included), data, "
        "evaluation and schedule")
    add("--before-pruning", action="store_true", help="what each run had before it pruned, at the end of its own "
        "dense training, and the change since; a dense row may have trained longer")
    add("--cost", default="macs", metavar="COST", help=f"for the Pareto front: one of {', '.join(COSTS)}")
    add("--format", metavar="FORMAT", help=f"one of {', '.join(formats.FORMATS)}; default: rich on a terminal, "
        "markdown elsewhere; csv has every number unrounded")
    add("--html", metavar="FILE", help="write a report with interactive plots that needs no network")
    add("--plots", metavar="DIR", help="write the plots as PNG and SVG")
    options = parser.parse_args(argv)
    for name, allowed in (("sort", SORT_KEYS), ("cost", tuple(COSTS)), ("format", formats.FORMATS)):
        value = getattr(options, name)
        if value is not None and value not in allowed:
            near = suggestion(value, allowed)
            raise UserError(f"--{name} {value} is not a choice{near}; allowed: {', '.join(allowed)}")
    if options.group and (options.html or options.plots or options.format == "csv"):
        raise UserError("--group parts the tables that are printed; not with --html, --plots or --format csv")
    options.format = options.format or ("rich" if sys.stdout.isatty() else "markdown")
    return options


def _check_group(key: str, runs: Sequence[RunResult]) -> None:
    conditions.require_key("--group", key, runs)
    if key == "seed" or "/" in key:
        raise UserError(f"--group {key}: rows are means over seeds, their results cannot part them; name an option")


def find(rows: Sequence[Row], runs: Sequence[RunResult], options: Namespace) -> Findings:
    """Return the findings across rows: differences to the baseline, Pareto front, published numbers."""
    metric = Findings.metric
    typed = options.baseline or []
    against = conditions.parse("--baseline", typed, runs)
    return Findings(
        differences=differences(rows, against, metric) if against else {},
        baseline=" ".join(typed),
        unpaired=without_baseline(rows, find_baselines(rows, against)) if against else (),
        over_dense=over_dense(rows),
        before_pruning=options.before_pruning or options.sort == "delta",
        front=frozenset(fronts(rows, metric, options.cost)),
        cost=options.cost,
        published=tuple(beside(rows)),
    )


def _write(rows: Sequence[Row], findings: Findings, notes: Sequence[str], options: Namespace) -> None:
    """Print the tables; with CSV and LaTeX, which programs read, remarks go to standard error."""
    for title, members in conditions.sections(rows, options.group).items() if options.format != "csv" else ():
        if title:
            print(f"% {title}" if options.format == "latex" else f"{to_ascii(title)}\n")
        _print_table(*table(members, findings), options.format)
        if title:
            print()
    if rows and options.format == "csv":
        print(formats.comma_separated(rows, findings), end="")
    stream = sys.stderr if options.format in ("csv", "latex") else sys.stdout
    if findings.published:
        header, cells, remarks = published_table(findings.published)
        notes = [*notes, *remarks]
        if stream is sys.stdout:
            print("\npublished numbers beside those here\n")
            _print_table(header, cells, options.format)
    if rows:
        print(file=stream)
    for line in notes:
        print(to_ascii(line), file=stream)


def _print_table(header: Sequence[str], cells: Sequence[Sequence[str]], form: str) -> None:
    if not cells:
        return
    if form == "rich":
        formats.rich(header, cells, sys.stdout)
    else:
        print((formats.latex if form == "latex" else formats.markdown)(header, cells), end="")


def _draw(rows: Sequence[Row], findings: Findings, notes: Sequence[str], options: Namespace) -> None:
    from prune_lab.commands.compare import figures

    if not rows:
        raise UserError(f"--{'html' if options.html else 'plots'}: no finished run to show")
    found = figures.build(rows, findings)
    for line in found.notes:
        print(to_ascii(line), file=sys.stderr)
    if options.plots:
        from prune_lab.commands.compare.plots import write_plots

        for path in write_plots(found, Path(options.plots)):
            print(f"written: {path}", file=sys.stderr)
    if options.html:
        from prune_lab.commands.compare.html import write_report

        write_report(rows, findings, found, notes, Path(options.html))
        print(f"written: {options.html}", file=sys.stderr)
