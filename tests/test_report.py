"""Reading runs back: grouping over seeds, exact means, nothing dropped, fast without torch."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time

import pytest

from prune_lab.report import aggregate, find_runs, main, read_runs, sort_rows, without_copies
from prune_lab.report_table import render, table
from prune_lab.schema import ConfigError


def write_run(root, name, *, group="g", seed=0, status="finished", error=None, config=None, **summary):
    """Make a run directory by hand; `summary` keys have __ for /."""
    path = root / name
    path.mkdir(parents=True)
    config = {"method": {"name": "rigl", "sparsity": 0.9}, "seed": seed} | (config or {})
    (path / "run.json").write_text(json.dumps({"id": name, "group": group, "config": config}))
    (path / "status.json").write_text(json.dumps({"status": status, "error": error}))
    if status == "finished":
        flat = {
            "status": "finished",
            "run/id": name,
            "run/group": group,
            "run/seed": seed,
            "config/method": "rigl",
            "config/model": "resnet20",
            "config/dataset": "digits",
            "config/schedule": "demo",
            "sparsity/requested": 0.9,
            "params/dense": 1000,
            "params/nonzero": 100,
        }
        flat |= {key.replace("__", "/"): value for key, value in summary.items()}
        (path / "summary.json").write_text(json.dumps(flat))
    return path


def test_mean_std_and_n_over_seeds(tmp_path):
    for seed, top1 in enumerate((90.0, 92.0, 94.0)):
        write_run(tmp_path, f"r{seed}", seed=seed, final__top1=top1, delta__top1=top1 - 95)
    (row,) = aggregate(read_runs([tmp_path]))
    assert (row.num_finished, row.num_runs) == (3, 3)
    assert row.stats["top1"].mean == 92.0
    assert row.stats["top1"].std == 2.0  # ddof 1: sqrt((4 + 0 + 4) / 2)
    assert row.stats["delta"].mean == -3.0
    assert row.stats["params_ratio"].mean == pytest.approx(0.1)


def test_single_run_has_no_std_and_missing_metric_is_no_zero(tmp_path):
    write_run(tmp_path, "r", final__top1=90.0, delta__top1=None)
    (row,) = aggregate(read_runs([tmp_path]))
    assert row.stats["top1"].std is None
    assert "delta" not in row.stats
    assert "delta to dense" not in table([row])[0]


def test_failed_and_unfinished_runs_are_counted_and_listed(tmp_path):
    write_run(tmp_path, "good", final__top1=90.0)
    write_run(tmp_path, "bad", seed=1, status="failed", error="loss is not finite")
    write_run(tmp_path, "cut", seed=2, status="running")
    broken = write_run(tmp_path, "broken", group="other", final__top1=1.0)
    (broken / "summary.json").write_text('{"final')
    runs = read_runs([tmp_path])
    (row,) = aggregate(runs)
    assert (row.num_finished, row.num_runs) == (1, 3)
    out = io.StringIO()
    render([row], runs, [], stream=out)
    text = out.getvalue()
    assert "1 of 3" in text and "not finished, 3 of 4 runs:" in text
    assert f"failed: {tmp_path / 'bad'} (loss is not finite)" in text
    assert f"running or killed: {tmp_path / 'cut'}" in text
    assert f"unreadable: {broken}" in text


def test_restarted_run_does_not_show_its_old_summary(tmp_path):
    path = write_run(tmp_path, "r", final__top1=90.0)
    (path / "status.json").write_text('{"status": "running", "error": null}')
    (run,) = read_runs([tmp_path])
    assert run.summary == {} and aggregate([run]) == []


def test_copies_of_one_run_count_once(tmp_path):
    write_run(tmp_path / "a", "r", final__top1=90.0)
    write_run(tmp_path / "b", "r", final__top1=90.0)
    runs, notes = without_copies(read_runs([tmp_path]))
    assert len(runs) == 1 and aggregate(runs)[0].num_runs == 1
    assert notes == [f"{tmp_path / 'b' / 'r'} is a copy of {tmp_path / 'a' / 'r'} (same run/id) and is not counted"]


def test_groups_with_equal_labels_show_the_options_in_which_they_differ(tmp_path):
    for name, lr in (("a", 0.1), ("b", 0.2)):
        config = {"schedule": {"train": {"lr": lr, "epochs": 3}}, "logger": {"project": name}}
        write_run(tmp_path, name, group=name, config=config, final__top1=90.0)
    rows = aggregate(read_runs([tmp_path]))
    assert [row.options for row in rows] == ["schedule.train.lr=0.1", "schedule.train.lr=0.2"]


def test_how_a_row_was_matched_is_shown_also_where_nothing_collides(tmp_path):
    to = {"match__kind": "train_macs", "match__to": "1:uniform"}
    write_run(tmp_path, "a", group="a", final__top1=90.0, **to, match__by="epochs", match__epochs=40)
    config = {"method": {"name": "rigl", "sparsity": 0.9, "match": "macs", "match_to": "0.1:uniform"}}
    solved = {"match__kind": "macs", "match__to": "0.1:uniform", "match__sparsity": 0.9}
    write_run(tmp_path, "b", group="b", config=config, final__top1=90.0, **solved)
    write_run(tmp_path, "c", group="c", final__top1=90.0)
    header, cells = table(aggregate(read_runs([tmp_path])))
    column = header.index("matched")
    assert [line[column] for line in cells] == ["train_macs = 1:uniform, 40 epochs", "macs = 0.1:uniform", "-"]
    assert "options" not in header
    assert "matched" not in table(aggregate(read_runs([tmp_path / "c"])))[0]


def test_find_runs_takes_folders_patterns_and_skips_phases(tmp_path):
    for name in ("x-s0", "x-s1", "y-s0", "phases/abc", "sub/z"):
        write_run(tmp_path, name)
    names = [path.name for path in find_runs([tmp_path])]
    assert names == ["z", "x-s0", "x-s1", "y-s0"]
    assert [path.name for path in find_runs([str(tmp_path / "x-*")])] == ["x-s0", "x-s1"]
    assert len(find_runs([tmp_path / "x-s0", tmp_path])) == 4


def test_sorting(tmp_path):
    for name, top1, macs in (("a", 80.0, 0.3), ("b", 90.0, 0.2), ("c", None, 0.1)):
        write_run(tmp_path, name, group=name, final__top1=top1, macs__inference_ratio=macs)
    rows = aggregate(read_runs([tmp_path]))
    assert [row.stats["macs"].mean for row in sort_rows(rows, "top1")] == [0.2, 0.3, 0.1]
    assert [row.stats["macs"].mean for row in sort_rows(rows, "macs")] == [0.1, 0.2, 0.3]


def test_main_writes_markdown_when_not_on_a_terminal(tmp_path, capsys):
    for seed, top1 in enumerate((90.0, 91.0)):
        write_run(tmp_path, f"r{seed}", seed=seed, final__top1=top1, time__wall_s=120.0)
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "method", "model", "dataset", "schedule", "sparsity", "n", "top-1 %", "params nonzero", "wall time",
    ]  # fmt: skip
    assert cells == ["rigl", "resnet20", "digits", "demo", "0.9", "2", "90.50 +- 0.71", "100 (10.0%)", "2 min 00 s"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such run or folder"),
        ([".", "--sort", "top2"], r"--sort top2 is not a choice \(did you mean 'top1'\?\)"),
        ([], "prune-lab compare: the following arguments are required: RUNS"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)


def test_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no runs in"):
        main([str(tmp_path)])


def test_thousand_runs_in_three_seconds_without_torch(tmp_path):
    for index in range(1000):
        write_run(tmp_path, f"r{index}", group=f"g{index // 3}", seed=index % 3, final__top1=90.0 + index % 7)
    code = (
        "import sys; from prune_lab.report import main; main([sys.argv[1]]);"
        "assert not {'torch', 'wandb', 'hydra'} & set(sys.modules)"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, stdout=subprocess.DEVNULL)
    assert time.monotonic() - started < 3


def write_controls(root):
    """Two seeds of a method, of its control `shuffle`, and a better method without controls."""
    for seed in (0, 1):
        own = write_run(root, f"own-s{seed}", group="own", seed=seed, final__top1=80.0 + seed)
        for kind, delta in (("shuffle", -3.0 - seed), ("invert", -30.0)):
            config = {"method": {"name": "rigl", "sparsity": 0.9, "control": kind}}
            beside = {"control__kind": kind, "control__delta": delta, "control__method_run": own.name}
            write_run(root, f"{kind}-s{seed}", group=kind, seed=seed, config=config, final__top1=81 + delta, **beside)
    write_run(root, "other", group="other", config__method="set", final__top1=79.0)


def test_a_control_stands_below_its_method(tmp_path):
    write_controls(tmp_path)
    rows = sort_rows(aggregate(read_runs([tmp_path])), "top1")
    assert [(row.group, row.control) for row in rows] == [
        ("own", "none"), ("shuffle", "shuffle"), ("invert", "invert"), ("other", ""),
    ]  # fmt: skip
    assert rows[1].stats["control"].mean == -3.5
    header, cells = table(rows)
    column = header.index("delta to method")
    assert [line[column] for line in cells] == ["-", "-3.50 +- 0.71", "-30.00 +- 0.00", "-"]
    assert "options" not in header  # the only difference has its own column


def test_a_control_without_its_method_keeps_its_delta(tmp_path):
    write_controls(tmp_path)
    rows = sort_rows(aggregate(read_runs([tmp_path / "shuffle-s0", tmp_path / "other"])), "top1")
    assert [row.control for row in rows] == ["", "shuffle"]
    assert rows[1].control_of is None and rows[1].stats["control"].mean == -3.0


def test_runs_without_controls_have_no_column_for_them(tmp_path):
    write_run(tmp_path, "r", final__top1=90.0)
    assert {"control", "delta to method"}.isdisjoint(table(aggregate(read_runs([tmp_path])))[0])
