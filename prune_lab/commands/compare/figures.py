"""From rows to the data of figures: points, lines, error bars and captions. Pure; no plotting library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from prune_lab.commands.compare import styles
from prune_lab.commands.compare.front import front_lines
from prune_lab.commands.compare.groups import COSTS, Row, Stat, stat_of
from prune_lab.commands.compare.styles import Style
from prune_lab.commands.compare.table import COST_NAMES, SAME, Findings
from prune_lab.commands.compare.trajectories import Course, Point, read_course
from prune_lab.tracking.lines import quantity, to_ascii

_COST_AXES = {
    "macs": "inference MACs per image",
    "train": "training MACs of the whole run",
    "params": "parameters left",
    "latency": "latency, ms",
}
_ACCURACY_AXES = {"accuracy": "top-1 accuracy on test images, %"}
_COURSE_KEYS = {
    "sparsity": ("Sparsity", "fraction of eligible weights that are zero"),
    "channels/kept": ("Channels kept", "fraction of the channels that the gates or thresholds leave open"),
    "mask/exploration": ("Exploration", "fraction of positions active at least once since the phase began (R_s)"),
    "mask/overlap": ("Overlap with the first mask", "fraction of active weights that were active as the phase began"),
    "mask/dead_filters": ("Dead filters", "output channels and neurons without any weight"),
    "mask/dropped": ("Churn: dropped", "weights dropped since the phase began"),
    "mask/grown": ("Churn: grown", "weights newly grown since the phase began"),
    "mask/regrown": ("Churn: regrown at once", "weights dropped and regrown in one update, since the phase began"),
    "mask/updates": ("Mask updates", "since the phase began"),
    "weights/overlap": ("Overlap of large weights", "fraction of the largest weights that were so at the start"),
}
SPREAD = "standard deviations over seeds (sample, n - 1), not confidence intervals; where n = 1 there are none"


@dataclass(frozen=True)
class Series:
    """One entry of a legend and what it draws."""

    label: str
    style: Style | None
    """None: the Pareto front"""
    x: tuple[float | str, ...]
    y: tuple[float, ...]
    x_std: tuple[float | None, ...]
    y_std: tuple[float | None, ...]
    """error bars of points, band of a line; None if a single run leaves it unknown"""
    n: tuple[int, ...]
    """runs behind each point"""
    notes: tuple[str, ...]
    """description of each point, in lines"""
    kind: str = "line"
    """points, line or front"""


@dataclass(frozen=True)
class View:
    """One state of a figure: its axes and series."""

    dataset: str
    key: str
    """for file names"""
    name: str
    """for the selector"""
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    log_x: bool = False
    categories: tuple[str, ...] = ()
    """labels of positions on the x-axis, if those are texts"""


@dataclass(frozen=True)
class Figure:
    """What is shown under one title."""

    key: str
    title: str
    caption: str
    selector: str
    """label of the choice between views of one data set"""
    views: tuple[View, ...]
    small: bool = False
    """is drawn side by side with others"""


@dataclass(frozen=True)
class Figures:
    """All figures of a comparison, and a line about every file that could not be read for them."""

    figures: tuple[Figure, ...]
    notes: tuple[str, ...]

    @property
    def datasets(self) -> list[str]:
        return list(dict.fromkeys(view.dataset for figure in self.figures for view in figure.views))


def build(rows: Sequence[Row], findings: Findings) -> Figures:
    """Return the figures of `rows`, read from the records of their finished runs; figures without data are left out."""
    notes: list[str] = []
    labels = styles.labels(rows)
    lines, by_method = styles.of_lines(rows)
    courses = [read_course(row, notes.append) for row in rows]
    meaning = "Colour: method, dash: row of it." if by_method else "Colour and dash: row."
    figures = (
        accuracy(rows, findings.metric, labels),
        density(courses, labels, lines, meaning),
        curves(courses, labels, lines, meaning),
        *course_figures(courses, labels, lines),
    )
    return Figures(tuple(figure for figure in figures if figure.views), tuple(map(to_ascii, notes)))


def _datasets(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.labels[2] for row in rows))


def accuracy(rows: Sequence[Row], metric: str, labels: dict[str, str]) -> Figure:
    """Return accuracy against each cost that a row has, with the Pareto front; one series per method."""
    kinds = styles.kind_names(rows)
    looks = styles.of_methods(rows, kinds)
    views = []
    for dataset in _datasets(rows):
        for cost in COSTS:
            shown = [row for row in rows if row.labels[2] == dataset and metric in row.stats and _cost(row, cost)]
            if shown:
                views.append(_accuracy_view(shown, metric, cost, labels, looks, kinds))
    caption = (
        f"A point per row of the table: the mean over its finished runs, n of them (shown on hovering). Error bars are "
        f"{SPREAD}. A line joins the rows that no other one of {SAME} beats: with at least the accuracy for at most "
        "the cost and one of them better; controls (hollow) are left out of it. It orders means and does not say "
        "whether their differences are beyond chance. Colour and marker: method, and kind of network or training if "
        "there are several."
    )
    return Figure("accuracy", "Accuracy against cost", caption, "Cost", tuple(views))


def _cost(row: Row, cost: str) -> Stat | None:
    return stat_of(row, COSTS[cost])


def _accuracy_view(
    rows: Sequence[Row], metric: str, cost: str, labels: dict[str, str], looks: dict[str, Style], kinds: dict[str, str]
) -> View:
    values = [_cost(row, cost).mean for row in rows]
    log_x = min(values) > 0 and max(values) >= 10 * min(values)
    points = [_accuracy_point(row, metric, cost, labels[row.group], looks[row.group], kinds) for row in rows]
    points.sort(key=lambda series: series.label)
    merged = [_merge(list(members)) for _, members in groupby(points, key=lambda series: series.label)]
    merged += _fronts(rows, metric, cost, kinds)
    title = _COST_AXES[cost] + (" (log scale)" if log_x else "")
    return View(rows[0].labels[2], cost, COST_NAMES[cost], title, _ACCURACY_AXES.get(metric, metric), tuple(merged),
                log_x)  # fmt: skip


def _fronts(rows: Sequence[Row], metric: str, cost: str, kinds: dict[str, str]) -> list[Series]:
    """Return the Pareto front of each set of comparable rows, named after the common properties of its rows."""
    lines = front_lines(rows, metric, cost)
    found = []
    for circle, best in lines:
        texts = [kinds[row.group].split() for row in circle]
        common = [word for word in texts[0] if all(word in words for words in texts)]
        x, y = (tuple(_cost(row, cost).mean for row in best), tuple(row.stats[metric].mean for row in best))
        name = " ".join(["Pareto front", *common])
        none = (None,) * len(best)
        found.append(Series(name, None, x, y, none, none, n=(), notes=(), kind="front"))
    return found


def _accuracy_point(
    row: Row, metric: str, cost: str, label: str, style: Style, kinds: dict[str, str]
) -> Series:
    x, y = _cost(row, cost), row.stats[metric]
    part = f", {row.evaluated} images" if row.evaluated else ""
    lines = [label, f"{_ACCURACY_AXES.get(metric, metric)}: {_spread(y, '{:.2f}'.format)}, n = {y.n}{part}"]
    if row.sparsity is not None:
        lines.append(f"sparsity requested: {row.sparsity:g}")
    achieved = stat_of(row, "sparsity/achieved")
    if achieved is not None:
        lines.append(f"sparsity achieved: {_spread(achieved, '{:.4g}'.format)}")
    for name, text in COST_NAMES.items():
        value = _cost(row, name)
        if value is not None:
            lines.append(f"{text}: {_spread(value, _milliseconds if name == 'latency' else quantity)}")
    control = f", control {row.control}" if style.hollow else ""
    name = " ".join(filter(None, (row.labels[0], kinds[row.group]))) + control
    return Series(to_ascii(name), style, (x.mean,), (y.mean,), (x.std,), (y.std,), (y.n,),
                  ("\n".join(lines),), "points")  # fmt: skip


def _merge(series: Sequence[Series]) -> Series:
    parts: dict[str, Any] = {
        field: tuple(value for one in series for value in getattr(one, field))
        for field in ("x", "y", "x_std", "y_std", "n", "notes")
    }
    return replace(series[0], **parts)


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms"


def _spread(found: Stat, form: Callable[[float], str]) -> str:
    return form(found.mean) + (f" +- {form(found.std)}" if found.std is not None else "")


def density(courses: Sequence[Course], labels: dict[str, str], looks: dict[str, Style], meaning: str) -> Figure:
    """Return the density of every layer, a line per row and a view per model and data set."""
    views = []
    for dataset, model in dict.fromkeys((course.row.labels[2], course.row.labels[1]) for course in courses):
        shown = [
            course for course in courses if course.densities and course.row.labels[1:3] == (model, dataset)
        ]  # fmt: skip
        if shown:
            layers = tuple(dict.fromkeys(name for course in shown for name in course.densities))
            series = tuple(
                _density_series(course, labels[course.row.group], looks[course.row.group]) for course in shown
            )
            views.append(View(dataset, model, model, "layer", "density", series, categories=layers))
    caption = (
        "The kept fraction of each layer's weights in the finished network, from the input to the output: mean over "
        f"the row's runs, standard deviation on hovering. {meaning} It does not show how many weights a layer has: a "
        "dense layer may be a small part of the network."
    )
    return Figure("density", "Density per layer", caption, "Model", tuple(views))


def _density_series(course: Course, label: str, style: Style) -> Series:
    found = course.densities
    notes = tuple(
        f"{label}\n{name}: density {_spread(value, '{:.4g}'.format)}, n = {value.n}" for name, value in found.items()
    )
    return Series(label, style, tuple(found), tuple(value.mean for value in found.values()),
                  (None,) * len(found), (None,) * len(found), tuple(value.n for value in found.values()),
                  notes)  # fmt: skip


def curves(courses: Sequence[Course], labels: dict[str, str], looks: dict[str, Style], meaning: str) -> Figure:
    """Return top-1 on the evaluation images during the runs, against epochs and against training MACs."""
    axes = {
        "epoch": ("epochs", "epochs trained, all phases", lambda point: point.epochs),
        "macs": ("training MACs", "training MACs so far", lambda point: point.macs),
    }
    views = []
    for dataset in _datasets([course.row for course in courses]):
        for key, (name, title, place) in axes.items():
            series = _course_series(courses, dataset, "eval/top1", place, labels, looks)
            if series:
                views.append(View(dataset, key, name, title, "evaluation top-1, %", series))
    caption = (
        "Top-1 on the evaluation images after each epoch and each pruning: mean over the row's runs that recorded the "
        f"epoch. Bands are {SPREAD}. Epochs are counted over all phases: what a method trains before it prunes, and "
        f"again after it rewinds, counts. {meaning} A curve's best value is no result: the table has the last epoch's."
    )
    return Figure("curves", "Training curves", caption, "Against", tuple(views))


def course_figures(courses: Sequence[Course], labels: dict[str, str], looks: dict[str, Style]) -> list[Figure]:
    """Return a small figure for sparsity and for each mask figure that a row has, against epochs."""
    recorded = {key for course in courses for point in course.points for key in point.values} - {"eval/top1"}
    figures = []
    for key in sorted(recorded, key=lambda key: (list(_COURSE_KEYS).index(key) if key in _COURSE_KEYS else 99, key)):
        title, meaning = _COURSE_KEYS.get(key, (key, "as the method recorded it"))
        views = []
        for dataset in _datasets([course.row for course in courses]):
            series = _course_series(courses, dataset, key, lambda point: point.epochs, labels, looks)
            if series:
                views.append(View(dataset, "", "epochs", "epochs trained, all phases", key, series))
        figures.append(Figure(key.replace("/", "-"), title, to_ascii(meaning), "", tuple(views), small=True))
    return figures


def _course_series(
    courses: Sequence[Course],
    dataset: str,
    key: str,
    place: Callable[[Point], float | None],
    labels: dict[str, str],
    looks: dict[str, Style],
) -> tuple[Series, ...]:
    """Return a line for every row of the data set whose runs recorded `key` where `place` is known."""
    found = []
    for course in courses:
        points = [point for point in course.points if key in point.values and place(point) is not None]
        if course.row.labels[2] == dataset and points:
            label, values = labels[course.row.group], [point.values[key] for point in points]
            found.append(
                Series(
                    label=label,
                    style=looks[course.row.group],
                    x=tuple(place(point) for point in points),
                    y=tuple(value.mean for value in values),
                    x_std=(None,) * len(points),
                    y_std=tuple(value.std for value in values),
                    n=tuple(value.n for value in values),
                    notes=tuple(_point_note(label, key, point) for point in points),
                )
            )
    return tuple(found)


def _point_note(label: str, key: str, point: Point) -> str:
    value = point.values[key]
    macs = "" if point.macs is None else f", {quantity(point.macs)} training MACs"
    when = f"{point.phase}, before training" if point.epoch == 0 else f"{point.phase}, epoch {point.epoch}"
    return to_ascii(
        f"{label}\n{when} ({point.epochs:g} in all{macs})\n{key}: {_spread(value, '{:.6g}'.format)}, n = {value.n}"
    )
