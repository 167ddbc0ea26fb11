"""Reading runs back: grouping over seeds, exact means, nothing dropped, fast without torch."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time

import pytest

from prune_lab.commands.compare.command import main
from prune_lab.commands.compare.conditions import apply, parse
from prune_lab.commands.compare.differences import Difference, differences, paired
from prune_lab.commands.compare.front import fronts, pareto
from prune_lab.commands.compare.groups import aggregate, sort_rows, stat_of
from prune_lab.commands.compare.runs import find_runs, read_runs, without_copies
from prune_lab.commands.compare.table import Findings, legend, table
from prune_lab.foundations.errors import UserError


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
    header = table([row], Findings(before_pruning=True))[0]
    assert {"before pruning %", "change since"}.isdisjoint(header)


def test_failed_and_unfinished_runs_are_counted_and_listed(tmp_path, capsys):
    write_run(tmp_path, "good", final__top1=90.0)
    write_run(tmp_path, "bad", seed=1, status="failed", error="loss is not finite")
    write_run(tmp_path, "cut", seed=2, status="running")
    broken = write_run(tmp_path, "broken", group="other", final__top1=1.0)
    (broken / "summary.json").write_text('{"final')
    runs = read_runs([tmp_path])
    (row,) = aggregate(runs)
    assert (row.num_finished, row.num_runs) == (1, 3)
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
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
        "method", "model", "dataset", "schedule", "sparsity", "n", "top-1 %", "params left", "wall time",
    ]  # fmt: skip
    assert cells == ["rigl", "resnet20", "digits", "demo", "0.9", "2", "90.50 +- 0.71", "100 (10.0%)", "2 min 00 s"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such run or folder"),
        ([".", "--sort", "top2"], r"--sort top2 is not a choice \(did you mean 'top1'\?\)"),
        ([".", "--cost", "mac"], r"--cost mac is not a choice \(did you mean 'macs'\?\); allowed: macs, train, params"),
        ([".", "--format", "tex"], r"--format tex is not a choice"),
        (["r", "--filter", "method"], r"--filter method: write name=value"),
        (["r", "--filter", "method.sparsty=0.9"], r"--filter method.sparsty: no run has it \(did you mean"),
        (["r", "--filter", "method=set"], r"--filter method=set: none of 1 runs is left"),
        (["r", "--baseline", "method=dense"], r"--baseline method=dense: no row is such"),
        (["r", "--group", "metod"], r"--group metod: no run has it \(did you mean 'method'\?\)"),
        (["r", "--group", "seed"], r"--group seed: rows are means over seeds"),
        (["r", "--group", "method", "--format", "csv"], r"--group parts the tables that are printed"),
        ([], "prune-lab compare: the following arguments are required: RUNS"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[:1] == ["r"]:
        write_run(tmp_path, "r", final__top1=90.0)
    with pytest.raises(UserError, match=message) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)


def test_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no runs in"):
        main([str(tmp_path)])


def test_thousand_runs_in_three_seconds_without_torch(tmp_path):
    for index in range(1000):
        write_run(tmp_path, f"r{index}", group=f"g{index // 3}", seed=index % 3, final__top1=90.0 + index % 7)
    code = (
        "import sys; from prune_lab.commands.compare.command import main; main([sys.argv[1]]);"
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
            top1 = 80.0 + seed
            beside = {"control__kind": kind, "control__method_top1": top1, "control__method_run": own.name}
            write_run(root, f"{kind}-s{seed}", group=kind, seed=seed, config=config, final__top1=top1 + delta, **beside)
    write_run(root, "other", group="other", config__method="set", final__top1=79.0)


def test_a_control_stands_below_its_method(tmp_path):
    write_controls(tmp_path)
    rows = sort_rows(aggregate(read_runs([tmp_path])), "top1")
    assert [(row.group, row.control) for row in rows] == [
        ("own", "none"), ("shuffle", "shuffle"), ("invert", "invert"), ("other", ""),
    ]  # fmt: skip
    assert rows[1].stats["control"].mean == 3.5
    header, cells = table(rows)
    column = header.index("method - control")
    assert [line[column] for line in cells] == ["-", "+3.50 +- 0.71", "+30.00 +- 0.00", "-"]
    assert any(line.startswith("method - control: ") and "above 0" in line for line in legend(rows, Findings()))
    assert "options" not in header  # the only difference has its own column


def test_a_control_without_its_method_keeps_its_difference(tmp_path):
    write_controls(tmp_path)
    rows = sort_rows(aggregate(read_runs([tmp_path / "shuffle-s0", tmp_path / "other"])), "top1")
    assert [row.control for row in rows] == ["", "shuffle"]
    assert rows[1].control_of is None and rows[1].stats["control"].mean == 3.0


def test_runs_without_controls_have_no_column_for_them(tmp_path):
    write_run(tmp_path, "r", final__top1=90.0)
    assert {"control", "method - control"}.isdisjoint(table(aggregate(read_runs([tmp_path])))[0])


def rows_of(root):
    return aggregate(read_runs([root]))


def write_seeds(root, name, values, **extra):
    for seed, top1 in enumerate(values):
        write_run(root, f"{name}-s{seed}", group=name, seed=seed, config__method=name, final__top1=top1,
                  config={"method": {"name": name, "sparsity": 0.9}}, **extra)  # fmt: skip


def test_differences_are_paired_over_seeds_with_students_interval(tmp_path, capsys):
    write_seeds(tmp_path, "dense", (90.0, 92.0, 94.0))
    write_seeds(tmp_path, "rigl", (89.0, 90.5, 93.0, 95.0))  # seed 3 has no partner
    assert main([str(tmp_path), "--baseline", "method=dense", "--format", "csv"]) == 0
    lines = {line["method"]: line for line in csv.DictReader(capsys.readouterr().out.splitlines())}
    assert float(lines["rigl"]["difference mean"]) == pytest.approx(-3.5 / 3)
    # differences -1, -1.5, -1: std 0.288675, t(0.975, 2) = 4.302653
    assert float(lines["rigl"]["difference half_width"]) == pytest.approx(4.302653 * 0.288675 / 3**0.5, rel=1e-5)
    assert lines["rigl"]["difference n"] == "3" and lines["dense"]["difference n"] == ""
    assert main([str(tmp_path), "--baseline", "method=dense"]) == 0
    assert "| -1.17 +- 0.72 (3) !" in capsys.readouterr().out


def test_one_pair_has_no_interval_and_none_no_difference():
    assert paired({0: 1.0}, {0: 3.0}) == Difference(-2.0, None, 1)
    assert paired({0: 1.0}, {1: 3.0}) is None
    assert not Difference(-2.0, None, 1).excludes_zero


def test_a_baseline_is_one_row_of_each_kind(tmp_path):
    write_seeds(tmp_path, "dense", (90.0,))
    write_seeds(tmp_path, "rigl", (80.0,))
    write_run(tmp_path, "other", group="other", config__model="vgg16", final__top1=70.0)
    rows = rows_of(tmp_path)
    typed = parse("--baseline", ["method=dense"], read_runs([tmp_path]))
    assert {key: value.mean for key, value in differences(rows, typed, "top1").items()} == {"rigl": -10.0}
    with pytest.raises(UserError, match=r"two rows of resnet20 on digits are such \(dense 0.9 schedule=demo; rigl"):
        differences(rows, parse("--baseline", ["method.sparsity=0.9"], read_runs([tmp_path])), "top1")


def test_pareto_front_by_hand():
    # (accuracy, cost): cheap and poor, dominated, best of its cost, equal twin, dearer but no better
    points = [(70.0, 1.0), (69.0, 2.0), (80.0, 3.0), (80.0, 3.0), (80.0, 4.0), (81.0, 5.0)]
    assert pareto(points) == [True, False, True, True, False, True]


def test_the_front_is_marked_per_data_set_and_against_the_cost_asked_for(tmp_path):
    for name, top1, macs, params in (("a", 80.0, 10, 30), ("b", 90.0, 20, 20), ("c", 70.0, 15, 40)):
        write_run(tmp_path, name, group=name, final__top1=top1, macs__inference=macs, params__nonzero=params)
    write_run(tmp_path, "d", group="d", config__dataset="other", final__top1=1.0, macs__inference=99)
    rows = rows_of(tmp_path)
    assert fronts(rows, "top1", "macs") == {"a", "b"}
    assert fronts(rows, "top1", "params") == {"b"}
    assert fronts(rows, "top1", "latency") == set()


def test_filters_take_groups_options_results_lists_and_negation(tmp_path):
    write_seeds(tmp_path, "dense", (90.0, 91.0))
    write_seeds(tmp_path, "rigl", (80.0,))
    write_run(tmp_path, "cut", status="running", config={"method": {"name": "set", "sparsity": 0.5}})
    runs = read_runs([tmp_path])

    def left(*typed):
        return [run.path.name for run in apply(parse("--filter", typed, runs), runs)]

    assert left("method=rigl,set") == ["cut", "rigl-s0"]
    assert left("method!=dense", "method.sparsity=0.90") == ["rigl-s0"]
    assert left("seed=1") == ["dense-s1"]
    assert left("method.sparsity=9e-1") == ["dense-s0", "dense-s1", "rigl-s0"]
    assert left("status=running") == ["cut"]
    assert left("final/top1=90") == ["cut", "dense-s0"], "what an unfinished run would have reached is not known"


def test_a_table_per_value_of_an_option(tmp_path, capsys):
    write_seeds(tmp_path, "dense", (90.0,))
    write_seeds(tmp_path, "rigl", (80.0,))
    assert main([str(tmp_path), "--group", "method"]) == 0
    text = capsys.readouterr().out
    assert text.index("method=dense\n") < text.index("| 90.00") < text.index("method=rigl\n") < text.index("| 80.00")


def test_latex_and_csv_keep_notes_out_of_the_table(tmp_path, capsys):
    write_run(tmp_path, "good", final__top1=90.0, dense__top1=91.5, delta__top1=-1.5, run__device="a_b")
    write_run(tmp_path, "bad", seed=1, status="failed", error="loss is not finite")
    assert main([str(tmp_path), "--format", "latex"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("\\begin{tabular}{llllllll}\n\\toprule\n") and r"top-1 \%" in captured.out
    assert main([str(tmp_path), "--format", "latex", "--before-pruning"]) == 0
    captured = capsys.readouterr()
    assert "& $-$1.50 &" in captured.out and "1 of 2" in captured.out
    assert "failed: " in captured.err and "loss is not finite" in captured.err
    assert main([str(tmp_path), "--format", "csv"]) == 0
    captured = capsys.readouterr()
    (line,) = csv.DictReader(captured.out.splitlines())
    assert (line["final/top1 mean"], line["final/top1 std"], line["final/top1 n"]) == ("90.0", "", "1")
    assert (line["runs"], line["finished"], line["seeds"]) == ("2", "1", "0")
    assert "loss is not finite" in captured.err


PAPER = {"cite": "Evci et al. 2020", "where": "figure 2", "certainty": "paper", "remark": "counted otherwise",
         "values": {"final/top1": 73.0, "macs/inference_ratio": 0.24}, "std": {"final/top1": 0.04}}  # fmt: skip


def test_published_numbers_stand_beside_those_measured(tmp_path, capsys):
    command = "prune-lab experiment=rigl/x seed=0 output_dir=o dataset.root=d"
    write_run(tmp_path, "r", config={"paper": PAPER}, final__top1=70.5, macs__inference_ratio=0.2418,
              run__command=command)  # fmt: skip
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "73.00 +- 0.04" in text and "Evci et al. 2020, figure 2 [paper]" in text and "counted otherwise" in text
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "macs/inf" in line]
    assert cells[0][1:5] == ["macs/inference_ratio", "0.24", "0.2418", "+0.0018"]
    assert "*" not in text


def test_a_recipe_with_other_options_is_not_the_papers_experiment(tmp_path, capsys):
    command = "prune-lab experiment=rigl/x schedule.multiplier=0.1 logger.wandb=disabled"
    write_run(tmp_path, "r", config={"paper": PAPER}, final__top1=70.5, run__command=command)
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "73.00 +- 0.04 *" in text
    assert "* rigl/x: not the paper's experiment, changed: schedule.multiplier=0.1" in text


def test_a_number_from_memory_is_never_shown_as_the_papers(tmp_path, capsys):
    write_run(tmp_path, "r", config={"paper": PAPER | {"certainty": "memory"}}, final__top1=70.5)
    assert main([str(tmp_path)]) == 0
    assert "73.00 +- 0.04 [memory]" in capsys.readouterr().out


def test_latency_is_read_from_the_runs_export(tmp_path):
    path = write_run(tmp_path, "r", final__top1=90.0)
    (path / "export").mkdir()
    rows = [{"runtime": "ONNX", "batch": 1, "dense": {"median_s": 1.0}, "pruned": {"median_s": 1.0}},
            {"runtime": "PyTorch", "batch": 64, "dense": {"median_s": 0.2}, "pruned": {"median_s": 0.1}},
            {"runtime": "PyTorch", "batch": 1, "dense": {"median_s": 0.004}, "pruned": {"median_s": 0.003}}]
    (path / "export" / "export.json").write_text(json.dumps({"latency": {"rows": rows}}))
    (row,) = rows_of(tmp_path)
    assert row.stats["latency"].mean == pytest.approx(3.0)
    assert stat_of(row, "latency/ratio").mean == pytest.approx(0.75)


def test_seeds_from_other_machines_are_said(tmp_path, capsys):
    for seed, device in enumerate(("cpu", "gpu")):
        write_run(tmp_path, f"r{seed}", seed=seed, final__top1=90.0, run__device=device)
    assert main([str(tmp_path)]) == 0
    assert "note: the runs of rigl 0.9 come from 2 kinds of machine or package versions" in capsys.readouterr().out


def test_accuracies_are_compared_on_test_images(tmp_path):
    held_out = {"dataset": {"name": "digits", "validation": 0.1}, "method": {"name": "rigl"}}
    write_run(tmp_path, "a", group="a", final__top1=95.0, test__top1=90.0, macs__inference=1, config=held_out)
    write_run(tmp_path, "b", group="b", config__method="static", final__top1=93.0, macs__inference=1)
    rows = rows_of(tmp_path)
    assert {row.group: row.stats["accuracy"].mean for row in rows} == {"a": 90.0, "b": 93.0}
    assert fronts(rows, "accuracy", "macs") == {"b"}


def test_a_control_without_its_method_is_not_on_the_front(tmp_path):
    write_run(tmp_path, "a", group="a", final__top1=95.0, macs__inference=1, control__kind="shuffle")
    write_run(tmp_path, "b", group="b", final__top1=90.0, macs__inference=1)
    write_run(tmp_path, "c", group="c", final__top1=80.0, macs__inference=1)
    assert fronts(rows_of(tmp_path), "accuracy", "macs") == {"b"}


def test_rows_that_print_alike_are_told_apart(tmp_path):
    for name, sparsity in (("a", 0.9482319), ("b", 0.9482321)):
        config = {"method": {"name": "rigl", "sparsity": sparsity}}
        write_run(tmp_path, name, group=name, final__top1=90.0, sparsity__requested=sparsity, config=config)
    for name in ("c", "d"):
        write_run(tmp_path, name, group=name, final__top1=90.0, config__method="set", control__kind="shuffle")
    names = [row.name for row in rows_of(tmp_path)]
    assert names == ["rigl 0.948232 method.sparsity=0.9482319", "rigl 0.948232 method.sparsity=0.9482321",
                     "set 0.9 c shuffle", "set 0.9 d shuffle"]  # fmt: skip


def test_runs_without_a_group_are_never_averaged(tmp_path):
    for folder, top1 in (("a", 90.0), ("b", 50.0)):
        path = write_run(tmp_path / folder, "r", final__top1=top1, run__id=folder)
        (path / "run.json").write_text("{}")
        summary = json.loads((path / "summary.json").read_text())
        del summary["run/group"]
        (path / "summary.json").write_text(json.dumps(summary))
    assert [row.stats["top1"].mean for row in rows_of(tmp_path)] == [90.0, 50.0]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("summary.json", {"final/top1": "high"}, "summary.json: final/top1 is 'high', no number"),
        ("summary.json", {"final/top1": float("nan")}, "summary.json: final/top1 is nan, no number"),
        ("summary.json", {"run/seed": [1]}, "summary.json: run/seed is [1]"),
        ("summary.json", {"run/id": 3}, "summary.json: run/id is 3"),
        ("run.json", {"config": 3}, "run.json: config is no group"),
        ("run.json", {"config": {"paper": {"cite": "x"}}}, "run.json: config.paper is not what a recipe has"),
        ("run.json", [1], "run.json holds no object"),
        ("status.json", {"status": [1]}, "status.json holds"),
        ("export/export.json", {"latency": {"rows": [None]}}, "export/export.json: TypeError"),
    ],
)
def test_odd_files_make_one_run_unreadable_and_stop_nothing(tmp_path, capsys, name, content, told):
    write_run(tmp_path, "good", group="other", final__top1=90.0)
    path = write_run(tmp_path, "odd", final__top1=90.0)
    (path / name).parent.mkdir(exist_ok=True)
    before = json.loads((path / name).read_text()) if (path / name).exists() else {}
    (path / name).write_text(json.dumps(content if isinstance(content, list) else before | content))
    assert main([str(tmp_path), "--filter", "method=rigl"]) == 0
    text = capsys.readouterr().out
    assert "| 90.00 " in text and f"  unreadable: {path} ({told}" in text


def test_linked_runs_are_found_and_an_empty_folder_is_said(tmp_path):
    write_run(tmp_path / "real", "r", final__top1=90.0)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "r").symlink_to(tmp_path / "real" / "r")
    assert [run.path.name for run in read_runs([tmp_path / "links"])] == ["r"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no runs in .*empty"):
        find_runs([tmp_path / "links", tmp_path / "empty"])


def test_equal_differences_are_no_evidence(tmp_path):
    assert not paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).excludes_zero


def test_two_recipes_of_one_method_keep_their_names_and_remarks(tmp_path, capsys):
    for name in ("grasp/a", "grasp/b"):
        config = {"paper": PAPER | {"remark": f"of {name}"}, "dataset": {"kind": "cifar"}}
        write_run(tmp_path, name.replace("/", "-"), group=name, config=config, final__top1=70.0,
                  run__command=f"prune-lab experiment={name} dataset.root=jpeg.tar")  # fmt: skip
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for name in ("grasp/a", "grasp/b"):
        assert f"* {name}: not the paper's experiment, changed: dataset.root=jpeg.tar" in text
        assert f"{name}: of {name}" in text
