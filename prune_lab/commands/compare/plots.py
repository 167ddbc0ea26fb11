"""The figures as PNG and SVG files, drawn by matplotlib."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from prune_lab.commands.compare.figures import Figure, Figures, Series, View
from prune_lab.commands.compare.styles import LIGHT
from prune_lab.foundations.errors import UserError

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

_MARKERS = ("o", "s", "D", "^", "X", "*", "v")
"""as styles.SYMBOLS"""
_LINES = ("-", "--", ":", "-.")
"""as styles.DASHES"""
_SETTINGS: dict[RcKeyType, Any]
_SETTINGS = {"svg.hashsalt": "prune-lab", "svg.fonttype": "none", "font.size": 9, "axes.grid": True,
             "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False,
             "axes.spines.right": False, "text.parse_math": False}  # fmt: skip
_MANY_PLACES = 40
"""with more layers, only some are named and points have no markers"""


def write_plots(figures: Figures, directory: Path) -> list[Path]:
    """Write FIGURE-DATASET-VIEW.png and .svg for every view of every figure; return the files.

    Raises:
        UserError: the directory or a file cannot be written.
    """
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(_SETTINGS):
            for figure in figures.figures:
                for view in figure.views:
                    canvas = draw(figure, view)
                    stem = re.sub(r"[^\w.-]+", "_", "-".join(filter(None, (figure.key, view.dataset, view.key))))
                    for kind, metadata in (("png", {}), ("svg", {"Date": None})):
                        written.append(directory / f"{stem}.{kind}")
                        canvas.savefig(written[-1], dpi=150, bbox_inches="tight", metadata=metadata)
    except OSError as error:
        raise UserError(f"--plots {directory}: cannot be written ({error.strerror or error})") from error
    return written


def draw(figure: Figure, view: View) -> Canvas:
    """Return one view as a matplotlib figure, legend to its right; _SETTINGS must be active."""
    wide = 7.5 if len(view.categories) > 25 else 5.5
    canvas = Canvas(figsize=(wide, 3.8))
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    handles = [_draw_series(axes, view, series) for series in view.series]
    place = f"{view.name} on {view.dataset}" if view.categories else view.dataset
    axes.set_title(f"{figure.title}, {place}\n{_about(view)}", fontsize=9, loc="left")
    axes.set_xlabel(view.x_title)
    axes.set_ylabel(view.y_title)
    _scale(axes, view)
    names = [textwrap.fill(series.label, 40) for series in view.series]
    columns = 1 + (len(names) - 1) // 25
    axes.legend(handles, names, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=7, ncols=columns)
    return canvas


def _about(view: View) -> str:
    """Return a note that the picture cannot show: means, spreads, and the number of runs."""
    counts = {num for series in view.series for num in series.n}
    spread = any(std is not None for series in view.series for std in (*series.x_std, *series.y_std))
    num = f"n = {min(counts)}" + (f" to {max(counts)}" if len(counts) > 1 else "")
    return f"means over seeds{' +- standard deviation' if spread else ''}, {num}"


def _draw_series(axes: Any, view: View, series: Series) -> Any:
    """Draw one series and return its handle for the legend."""
    if series.kind == "front":
        return axes.plot(series.x, series.y, color="#888888", linewidth=1.2, zorder=1.5)[0]
    style = series.style
    color, marker = LIGHT[style.color], _MARKERS[style.symbol]
    filled = {"markerfacecolor": "white" if style.hollow else color, "markeredgecolor": color}
    if series.kind == "points":
        x_error, y_error = ([std or 0.0 for std in stds] for stds in (series.x_std, series.y_std))
        return axes.errorbar(series.x, series.y, xerr=x_error, yerr=y_error, fmt=marker, markersize=6, color=color,
                             elinewidth=1.0, capsize=2, **filled)[0]  # fmt: skip
    places = [view.categories.index(name) for name in series.x] if view.categories else series.x
    if max(len(series.x), len(view.categories)) > _MANY_PLACES:
        marker = ""
    line = axes.plot(places, series.y, color=color, marker=marker, markersize=3.5, linewidth=1.2,
                     linestyle=_LINES[style.dash], **filled)[0]  # fmt: skip
    known = [(x, y - std, y + std) for x, y, std in zip(places, series.y, series.y_std, strict=True) if std is not None]
    if known:
        axes.fill_between(*zip(*known, strict=True), color=color, alpha=0.15, linewidth=0)
    return line


def _scale(axes: Any, view: View) -> None:
    if view.categories:
        step = -(-len(view.categories) // _MANY_PLACES)
        shown = range(0, len(view.categories), step)
        axes.set_xticks(shown, [view.categories[index] for index in shown], rotation=90, fontsize=6)
        axes.set_ylim(0, None)
        return
    if view.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if max(float(value) for series in view.series for value in series.x) >= 1000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
