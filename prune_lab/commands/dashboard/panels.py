"""Content of the W&B workspace: sections of panels over the keys that runs log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import RunsetSettings, Section, WorkspaceSettings

    Panel = (wr.LinePlot | wr.ScatterPlot | wr.BarPlot | wr.ParallelCoordinatesPlot | wr.RunComparer
             | wr.WeavePanelSummaryTable)  # fmt: skip

TOP1, TEST = "final/top1", "test/top1"
_TITLES = {TOP1: "top-1 on the evaluation images (%)", TEST: "top-1 on the test images (%)"}
"""with dataset.validation the evaluation images are held out of training, and test/top1 exists too"""
COSTS = {
    "macs/inference": "MACs per image",
    "macs/train": "training MACs",
    "params/kept": "parameters left",
}
"""key of the summary -> title"""
COLUMNS = (TOP1, "sparsity/achieved", "macs/inference_ratio", "macs/train_ratio", "params/kept")
"""columns of the table of runs, where a group shows its mean"""

_AXES = {"global_step": "optimizer step", "epoch": "epoch of the phase", "macs/train": "training MACs"}
_MAX_LINES = 100
"""groups per panel; W&B shows ten by default"""


def sections() -> list[Section]:
    """Return the sections in order; the first two are open."""
    parts = {
        "Accuracy against cost": _costs(),
        "Training": _curves(),
        "Sparsity": _sparsity(),
        "Layers": _layers(),
        "Masks": _masks(),
        "All options": _options(),
    }
    found = []
    for index, (name, panels) in enumerate(parts.items()):
        for number, panel in enumerate(panels):
            panel._id = f"prunelab{index}{number}"  # random by default, so that every call would write different panels
        layout = ws.SectionLayoutSettings(columns=3, rows=(len(panels) + 2) // 3)
        found.append(ws.Section(name=name, panels=[*panels], is_open=index < 2, layout_settings=layout))
    return found


def settings() -> WorkspaceSettings:
    """Return the settings of all panels: measured values, without smoothing."""
    return ws.WorkspaceSettings(x_axis="global_step", smoothing_type="none", max_runs=_MAX_LINES)


def runset() -> RunsetSettings:
    """Return the listing of runs: grouped over seeds, which share the W&B group."""
    return ws.RunsetSettings(groupby=[ws.Metric("Group")], pinned_columns=[f"summary:{key}" for key in COLUMNS])


def _costs() -> list[Panel]:
    points = [_scatter(key, title, log_x=True) for key, title in COSTS.items()]
    test = _scatter("macs/inference", COSTS["macs/inference"], y=TEST, log_x=True)
    bars = wr.BarPlot(
        title=f"{_TITLES[TOP1]}, mean and standard deviation over seeds",
        metrics=[TOP1],
        groupby="Group",
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        max_runs_to_show=_MAX_LINES,
        max_bars_to_show=_MAX_LINES,
    )
    return [*points, test, bars]


def _curves() -> list[Panel]:
    titles = {"eval/top1": _TITLES[TOP1], "train/loss": "training loss"}
    return [_lines([key], f"{title} / {_AXES[x]}", x=x) for key, title in titles.items() for x in _AXES]


def _sparsity() -> list[Panel]:
    return [
        _lines(["sparsity"], "sparsity"),
        _lines(["channels/kept"], "channels kept, where channels are removed"),
        _lines(["macs/inference"], "MACs per image"),
        _scatter("sparsity/achieved", "sparsity"),
    ]


def _layers() -> list[Panel]:
    density = _lines([], "density per layer", metric_regex="mask/density/.*")
    return [density, wr.WeavePanelSummaryTable(table_name="layers")]


def _masks() -> list[Panel]:
    return [
        _lines(["mask/exploration"], "fraction of positions ever active (R_s)"),
        _lines(["mask/overlap"], "fraction of active weights active from the start"),
        _lines(["mask/dead_filters"], "filters without a weight"),
        _lines(["mask/dropped", "mask/grown", "mask/regrown"], "churn: weights dropped, grown, regrown so far"),
    ]


def _options() -> list[Panel]:
    column = wr.ParallelCoordinatesPlotColumn
    columns = [
        column(metric=wr.Config("method.name"), display_name="method"),
        column(metric=wr.SummaryMetric("sparsity/achieved"), display_name="sparsity"),
        column(metric=wr.SummaryMetric("macs/inference_ratio"), display_name="MACs / dense"),
        column(metric=wr.SummaryMetric("macs/train_ratio"), display_name="training MACs / dense over schedule.train"),
        column(metric=wr.SummaryMetric(TOP1), display_name=_TITLES[TOP1]),
    ]
    parallel = wr.ParallelCoordinatesPlot(title=f"from method to {_TITLES[TOP1]}", columns=columns)
    return [parallel, wr.RunComparer(diff_only="split")]


def _scatter(key: str, title: str, *, y: str = TOP1, log_x: bool | None = None) -> Panel:
    shown = f"{_TITLES[y]} against {title}"
    return wr.ScatterPlot(title=shown, x=wr.SummaryMetric(key), y=wr.SummaryMetric(y), log_x=log_x)


def _lines(keys: list[str], title: str, *, x: str = "global_step", metric_regex: str | None = None) -> Panel:
    """Return one line per group: the mean over its runs, and their standard deviation as a band."""
    return wr.LinePlot(
        title=title,
        x=x,
        y=[*keys],
        metric_regex=metric_regex,
        title_x=_AXES[x],
        groupby="Group",
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        max_runs_to_show=_MAX_LINES,
    )
