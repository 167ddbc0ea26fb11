"""The W&B workspace: stored on a server on this machine, beside a run that was sent there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

from prune_lab.commands.dashboard import command as dashboard
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import read_json
from tests.helpers import runs
from tests.helpers.wandb_server import API_KEY, ENTITY, StoredRun, WandbServer
from tests.helpers.wandb_user import call, online, user_environment

pytest.importorskip("wandb_workspaces")

AXES = {"global_step", "epoch", "macs/train"}
LINES = "Run History Line Plot"


@dataclass
class Project:
    """What the server holds after one run was sent and the workspace stored three times, once by another name."""

    run: StoredRun
    local: dict
    """run.json of the run"""
    views: dict[str, dict]
    printed: list[str]

    def spec(self) -> dict:
        return json.loads(self.views["view0"]["spec"])["section"]

    def panels(self, kind: str) -> list[dict]:
        """Return the configurations of the panels of one kind."""
        found = [panel for section in self.spec()["panelBankConfig"]["sections"] for panel in section["panels"]]
        return [panel["config"] for panel in found if panel["viewType"] == kind]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    folder = tmp_path_factory.mktemp("dashboard")
    options = [*runs.TINY, *runs.METHODS["rigl"], "dataset.validation=0.25"]  # for test/top1
    assert runs.execute(folder / "outputs", *options) == 0
    run_dir = runs.run_dir(folder / "outputs")
    with WandbServer() as server:
        env = online(user_environment(folder), server)
        sent = call("wandb-sync", run_dir, env=env)
        assert sent.returncode == 0, sent.stderr
        names = ([], [], ["--name", "other"])
        code = f"from prune_lab.cli.command import main\nfor name in {names}: assert main(['dashboard', *name]) == 0"
        child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
        assert child.returncode == 0, child.stderr
        assert child.stderr == ""
        (run,) = server.runs.values()
        lines = [line.replace(server.url, "SERVER") for line in child.stdout.splitlines()]
        return Project(run, read_json(run_dir / "run.json"), server.views, lines)


def test_repeating_the_command_updates_its_view(project):
    assert [view["displayName"] for view in project.views.values()] == ["prune-lab", "other"]
    own, other = project.views.values()
    assert own["name"] != other["name"]
    address = own["name"].removeprefix("nw-").removesuffix("-v")
    assert re.fullmatch("[0-9a-f]{11}", address)
    created, updated, _ = project.printed
    assert created == f"workspace 'prune-lab' created: SERVER/{ENTITY}/prune-lab?nw={address}"
    assert updated == created.replace("created", "updated")
    assert own["id"] == "view0"  # the second time
    assert (own["entityName"], own["projectName"], own["type"]) == (ENTITY, "prune-lab", "project-view")


def test_what_is_printed_is_what_is_stored(project, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", None)  # no network
    assert dashboard.main(["--print", "--entity", ENTITY]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["spec"] == json.loads(project.views["view0"]["spec"])
    assert (printed["entity"], printed["project"], printed["displayName"]) == (ENTITY, "prune-lab", "prune-lab")


def test_sections_hold_the_panels(project):
    sections = project.spec()["panelBankConfig"]["sections"]
    kinds = {section["name"]: [panel["viewType"] for panel in section["panels"]] for section in sections}
    assert kinds == {
        "Accuracy against cost": ["Scatter Plot"] * 4 + ["Bar Chart"],
        "Training": [LINES] * 6,
        "Sparsity": [LINES] * 3 + ["Scatter Plot"],
        "Layers": [LINES, "Weave"],
        "Masks": [LINES] * 4,
        "All options": ["Parallel Coordinates Plot", "Run Comparer"],
    }
    ids = [panel["__id__"] for section in sections for panel in section["panels"]]
    assert len(set(ids)) == len(ids)


def test_scatter_panels_plot_keys_of_the_summary(project):
    plots = project.panels("Scatter Plot")
    costs = [plot["xAxis"] for plot in plots]
    expected = ("macs/inference", "macs/train", "params/kept", "macs/inference", "sparsity/achieved")
    assert costs == [f"summary:{key}" for key in expected]
    assert [plot["yAxis"] for plot in plots] == [f"summary:{key}/top1" for key in ("final",) * 3 + ("test", "final")]
    titles = [plot["chartTitle"] for plot in plots]
    assert [title.partition(" against ")[0] for title in titles] == [
        f"top-1 on the {images} images (%)" for images in ("evaluation",) * 3 + ("test", "evaluation")
    ]
    assert "test/top1" in project.run.summary
    (bars,) = project.panels("Bar Chart")
    columns = project.spec()["runSets"][0]["runFeed"]["columnOrder"]
    shown = {name.removeprefix("summary:") for name in [*costs, *columns] if name != "run:displayName"}
    assert shown | set(bars["metrics"]) <= project.run.summary.keys()


def test_line_panels_plot_what_a_run_logs_in_the_same_record(project):
    plots = project.panels(LINES)
    drawn = {(plot["xAxis"], key) for plot in plots for key in plot["metrics"]}
    drawn -= {("global_step", "channels/kept")}  # this run keeps all channels
    rows = [row.keys() for row in project.run.history]
    for axis, key in drawn:
        assert any({axis, key} <= row for row in rows), (axis, key)
    assert {axis for axis, key in drawn if key == "eval/top1"} == AXES
    assert {key for _, key in drawn} >= {"sparsity", "mask/exploration", "mask/overlap", "mask/grown", "train/loss"}


def test_density_is_drawn_for_every_layer_with_a_mask(project):
    (pattern,) = [plot["metricRegex"] for plot in project.panels(LINES) if plot.get("useMetricRegex")]
    keys = {key for row in project.run.history for key in row}
    matched = {key for key in keys if re.search(pattern, key)}
    assert matched == {key for key in keys if re.fullmatch(pattern, key)}
    assert {"mask/density/conv1", "mask/density/layer3.2.conv2", "mask/density/linear"} <= matched
    assert not {key for key in matched if "exploration" in key}
    (table,) = project.panels("Weave")
    assert '"layers"' in json.dumps(table)
    assert project.run.summary["layers"]["_type"] == "table-file"


def test_parallel_coordinates_find_options_and_results(project):
    (plot,) = project.panels("Parallel Coordinates Plot")
    accessors = [column["accessor"] for column in plot["columns"]]
    assert accessors[0] == "config:method.value.name"
    assert project.run.config["method"]["value"]["name"] == "rigl"
    assert {accessor.removeprefix("summary:") for accessor in accessors[1:]} <= project.run.summary.keys()


def test_runs_are_grouped_over_seeds(project):
    assert project.run.fields["groupName"] == project.local["group"]
    assert project.spec()["runSets"][0]["grouping"] == [{"section": "run", "name": "group"}]
    for plot in [*project.panels(LINES), *project.panels("Bar Chart")]:
        assert (plot["groupBy"], plot["groupAgg"], plot["groupArea"]) == ("group", "mean", "stddev")


def test_refusals_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="dashboard needs a W&B key .*--print shows the workspace without one"):
        dashboard.main([])
    with pytest.raises(UserError, match="--name fast \U0001f600 is no name of a view"):
        dashboard.main(["--print", "--name", "fast \U0001f600"])
    with pytest.raises(UserError, match="unrecognized arguments: --projekt"):
        dashboard.main(["--projekt", "x"])
    monkeypatch.setattr(dashboard, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs the package wandb-workspaces: pip install wandb-workspaces"):
        dashboard.main(["--print"])


def test_refusals_of_the_server_are_one_line(tmp_path):
    with WandbServer() as server:
        env = online(user_environment(tmp_path), server) | {"WANDB_HTTP_TIMEOUT": "1"}
        unknown = call("dashboard", "--project", "none", env=env)
        assert unknown.returncode == 1
        assert unknown.stderr.startswith(f"prune-lab: error: W&B has no project {ENTITY}/none, or it is not yours")
        server.mode = "error"
        refused = call("dashboard", env=env)
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"prune-lab: error: W&B: Failed to verify credentials with {server.url}")
        assert [answer.stderr.count("\n") for answer in (unknown, refused)] == [1, 1]
        assert API_KEY not in unknown.stderr + refused.stderr
