"""Which runs are compared with which: equal model, data, evaluation and schedule; all differences printed."""

from __future__ import annotations

import csv
import json
import re
from argparse import Namespace
from pathlib import Path

import pytest

from prune_lab.commands.compare import figures, peers, styles
from prune_lab.commands.compare.command import find, main
from prune_lab.commands.compare.differences import over_dense
from prune_lab.commands.compare.front import front_lines, fronts
from prune_lab.commands.compare.groups import aggregate
from prune_lab.commands.compare.runs import read_runs
from prune_lab.commands.compare.table import Findings, table
from prune_lab.foundations.errors import UserError

STUDY = Path(__file__).parents[3] / "outputs" / "reference" / "study_3_epochs"


def write_run(root, name, *, method="rigl", seed=0, top1=90.0, model=None, data=None, schedule=None, trainer=None,
              options=None, phases=None, **summary):  # fmt: skip
    """Make the directory of a finished run with all its options; keys of `summary` have __ for /."""
    schedule = {"name": "short", "batch_size": 128, "multiplier": 1.0, "train": {"epochs": 10, "lr": 0.1},
                "finetune": {"epochs": 4, "lr": 0.02}} | (schedule or {})  # fmt: skip
    config = {
        "model": {"name": "resnet20", "width": 1.0} | (model or {}),
        "dataset": {"name": "cifar10", "kind": "cifar", "validation": 0.0, "num_train": 50000, "num_test": 10000,
                    "root": "data"} | (data or {}),
        "method": {"name": method} | (options or {}),
        "schedule": schedule,
        "trainer": {"precision": "auto", "eval_batch_size": 500, "limit_eval_batches": None,
                    "limit_train_batches": None} | (trainer or {}),
        "seed": seed,
    }  # fmt: skip
    trained = [{"name": key, "epochs": epochs} for key, epochs in (phases or {"train": 10}).items()]
    flat = {"status": "finished", "run/id": name, "run/group": name, "run/seed": seed, "final/top1": top1,
            "sparsity/requested": None, "phases": trained}  # fmt: skip
    flat |= {f"config/{group}": config[group]["name"] for group in ("method", "model", "dataset", "schedule")}
    flat |= {key.replace("__", "/"): value for key, value in summary.items()}
    path = root / name
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"id": name, "config": config}))
    (path / "status.json").write_text('{"status": "finished"}')
    (path / "summary.json").write_text(json.dumps(flat))
    return path


def rows_of(root):
    return {row.group: row for row in aggregate(read_runs([root]))}


def cells_of(capsys):
    lines = [[cell.strip() for cell in line.strip("| \n").split("|")]
             for line in capsys.readouterr().out.splitlines() if line.startswith("|")]  # fmt: skip
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def test_training_macs_of_the_stored_study_are_over_its_dense_row(capsys):
    assert main([str(STUDY)]) == 0
    found = {row["method"]: row["train MACs / dense row"] for row in cells_of(capsys)}
    assert (found["dense"], found["l1_filter"], found["greedy"], found["magnitude"]) == (
        "1.000", "0.833", "1.065", "0.740",
    )  # fmt: skip
    assert main([str(STUDY), "--format", "csv"]) == 0
    lines = {line["method"]: line for line in csv.DictReader(capsys.readouterr().out.splitlines())}
    assert float(lines["greedy"]["train MACs over dense row"]) == pytest.approx(19404768264192 / 18218771251200)


def test_without_a_dense_row_training_macs_are_absolute(capsys):
    assert main([str(STUDY), "--filter", "method=l1_filter,greedy"]) == 0
    rows = cells_of(capsys)
    assert [row["train MACs"] for row in rows] == ["19.4 T", "15.2 T"]
    assert not any("dense row" in name for name in rows[0])


def test_the_dense_row_of_another_width_schedule_or_batch_is_no_denominator(tmp_path, capsys):
    for name, changed in (
        ("same", {}), ("narrow", {"model": {"width": 0.25}}), ("batch", {"schedule": {"batch_size": 64}}),
        ("long", {"schedule": {"multiplier": 2.0}, "phases": {"train": 20}}),
    ):  # fmt: skip
        write_run(tmp_path, name, macs__train=50, **changed)
    write_run(tmp_path, "part", method="set", macs__train=60, trainer={"limit_eval_batches": 4})  # trained like others
    write_run(tmp_path, "tuned", method="magnitude", macs__train=140, phases={"train": 10, "finetune": 4})
    write_run(tmp_path, "dense", method="dense", macs__train=100)
    assert over_dense(list(rows_of(tmp_path).values())) == {
        "same": 0.5, "part": 0.6, "tuned": 1.4, "dense": 1.0,
    }  # fmt: skip
    assert main([str(tmp_path)]) == 0
    rest = "schedule.batch_size=128 schedule.multiplier=1.0"
    columns = "train MACs", "train MACs / dense row"
    told = {(row["method"], row["options"]): tuple(row[name] for name in columns) for row in cells_of(capsys)}
    assert told["rigl", f"model.width=0.25 {rest}"] == ("50", "-")
    assert told["rigl", f"model.width=1.0 {rest}"] == ("50", "0.500")


def test_dense_rows_of_unequal_cost_are_no_denominator(tmp_path):
    for name, macs in (("a", 100), ("b", 120)):
        write_run(tmp_path, name, method="dense", macs__train=macs, schedule={"label_smoothing": len(name) * macs})
    write_run(tmp_path, "rigl", macs__train=50)
    assert over_dense(list(rows_of(tmp_path).values())) == {}


def test_accuracy_before_pruning_is_shown_on_request_with_its_epochs(capsys):
    assert main([str(STUDY), "--filter", "method=dense,l1_filter"]) == 0
    assert not any("prun" in name or "delta" in name for name in cells_of(capsys)[0])
    assert main([str(STUDY), "--filter", "method=dense,l1_filter", "--before-pruning"]) == 0
    dense, pruned = cells_of(capsys)
    assert (pruned["before pruning %"], pruned["change since"]) == ("64.30 (2 epochs)", "+0.08")
    assert (dense["before pruning %"], dense["change since"]) == ("-", "-")


def test_every_option_in_which_rows_differ_is_printed(tmp_path):
    write_run(tmp_path, "a", model={"width": 0.25}, run__device="cpu (fp32)", options={"interval": 10})
    write_run(tmp_path, "b", schedule={"batch_size": 64}, run__device="cpu (bf16)", options={"interval": 20})
    write_run(tmp_path, "c", method="static", run__device="cpu (bf16)", data={"root": "elsewhere"})
    assert {name: row.options for name, row in rows_of(tmp_path).items()} == {
        "a": "model.width=0.25 method.interval=10 schedule.batch_size=128 trainer.precision=fp32",
        "b": "model.width=1.0 method.interval=20 schedule.batch_size=64 trainer.precision=bf16",
        "c": "model.width=1.0 schedule.batch_size=128 trainer.precision=bf16",
    }


def test_folders_are_known_by_their_content_not_by_how_their_path_was_typed(tmp_path):
    for name, root, content in (
        ("a", "birds", "aaaaaaaaa"), ("b", "./birds", "aaaaaaaaa"), ("c", "other birds", "ccccccccc"),
        ("d", "birds", "ddddddddd"), ("old", "birds", None),
    ):  # fmt: skip
        write_run(tmp_path, name, data={"name": "own", "kind": "imagefolder", "root": root}, data__content=content,
                  options={"interval": ord(name[0])}, macs__inference=1)  # fmt: skip
    write_run(tmp_path, "e", data={"name": "own", "kind": "imagefolder", "root": "birds", "validation": 0.1},
              data__content="eeeeeeeee")  # fmt: skip
    rows = rows_of(tmp_path)
    texts = {name: re.search(r"dataset\.root=(.*?)(?: [a-z]+\.|$)", row.options)[1] for name, row in rows.items()}
    assert texts == {"a": "birds", "b": "birds", "c": "other birds", "d": "birds (dddddddd)", "e": "birds",
                     "old": "birds"}  # fmt: skip
    fitting = {frozenset(other for other in rows if rows[other].kind.fits(row.kind)) for row in rows.values()}
    assert fitting == {frozenset({"a", "b", "old"}), frozenset("c"), frozenset("d"), frozenset("e")}
    assert rows["d"].kind.unlike(rows["a"].kind) == ["dataset.root birds (dddddddd) / birds"]
    assert "root=other birds" in styles.kind_names(list(rows.values()))["c"]


def test_start_weights_are_known_by_their_content_and_marked_in_every_row(tmp_path, capsys):
    for name, path, content, zeros in (
        ("a", "w.pt", "aaaaaaaaa", 0.88), ("b", "./w.pt", "aaaaaaaaa", 0.88), ("c", "w.pt", "ccccccccc", 0.0),
    ):  # fmt: skip
        write_run(tmp_path, name, method="dense" if name == "a" else "rigl", model={"weights": path}, start__top1=79.5,
                  start__zeros=zeros, start__content=content)  # fmt: skip
    write_run(tmp_path, "fresh", method="dense", model={"weights": None})
    rows = rows_of(tmp_path)
    assert rows["a"].kind.fits(rows["b"].kind)
    assert not any(rows[name].kind.fits(rows["a"].kind) for name in ("c", "fresh"))
    assert main([str(tmp_path)]) == 0
    assert {(row["options"], row["start weights"]) for row in cells_of(capsys)} == {
        ("model.weights=w.pt", "79.50 %, 88% zeros"), ("model.weights=w.pt (cccccccc)", "79.50 %"),
        ("model.weights=null", "-"),
    }  # fmt: skip


def test_images_of_ones_own_under_a_published_name_are_other_images(tmp_path):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", data={"root": "mine"}, data__content="bbbbbbbbb")
    rows = rows_of(tmp_path)
    assert (rows["a"].options, rows["b"].options) == ("dataset.root=published", "dataset.root=mine")
    assert not rows["a"].kind.fits(rows["b"].kind)


def test_a_method_whose_code_was_replaced_is_not_told_by_its_name_alone(tmp_path):
    write_run(tmp_path, "a", options={"_target_": "prune_lab.methods.rigl.RigL", "interval": 1})
    write_run(tmp_path, "b", options={"_target_": "own.Rule", "interval": 2})
    write_run(tmp_path, "c", method="set", options={"_target_": "prune_lab.methods.set.SET"})
    assert {name: row.options for name, row in rows_of(tmp_path).items()} == {
        "a": "method._target_=prune_lab.methods.rigl.RigL method.interval=1",
        "b": "method._target_=own.Rule method.interval=2", "c": "",
    }  # fmt: skip


def test_options_of_models_and_data_sets_are_compared_among_their_own(tmp_path):
    write_run(tmp_path, "a", model={"name": "vgg16", "width": 2.0})
    write_run(tmp_path, "b", data={"name": "digits", "num_test": 359})
    write_run(tmp_path, "c")
    assert [row.options for row in rows_of(tmp_path).values()] == ["", "", ""]


def test_a_baseline_is_paired_within_its_kind_only(tmp_path, capsys):
    """A difference of 67.69 points between networks of width 1 and 0.25 was once printed as one of methods."""
    write_run(tmp_path, "dense", method="dense", top1=92.0)
    write_run(tmp_path, "rigl", top1=91.0)
    write_run(tmp_path, "narrow", model={"width": 0.25}, top1=24.31)
    assert main([str(tmp_path), "--baseline", "method=dense"]) == 0
    text = capsys.readouterr().out
    assert "-67.69" not in text and "-1.00 (1)" in text
    assert "(here / there): rigl model.width=0.25: model.width 0.25 / 1.0\n" in text


def test_baselines_of_several_kinds_serve_each_their_own(tmp_path, capsys):
    for width, top1 in ((1.0, 92.0), (0.25, 80.0)):
        write_run(tmp_path, f"dense{width}", method="dense", model={"width": width}, top1=top1)
        write_run(tmp_path, f"rigl{width}", model={"width": width}, top1=top1 - width)
    assert main([str(tmp_path), "--baseline", "method=dense"]) == 0
    assert [row["against method=dense"] for row in cells_of(capsys)] == ["-", "-", "-0.25 (1)", "-1.00 (1)"]
    write_run(tmp_path, "again", method="dense", schedule={"train": {"epochs": 10, "lr": 0.5}})
    with pytest.raises(UserError, match="two rows of resnet20 on cifar10 are such"):
        main([str(tmp_path), "--baseline", "method=dense"])


def test_schedules_are_equal_as_asked_for_or_in_all(tmp_path):
    tuned = {"train": 10, "finetune": 4}
    write_run(tmp_path, "dense10", method="dense")
    write_run(tmp_path, "dense14", method="dense", schedule={"train": {"epochs": 14}}, phases={"train": 14})
    write_run(tmp_path, "asked", method="magnitude", phases=tuned)
    write_run(tmp_path, "longer", method="magnitude", schedule={"finetune": {"epochs": 8}},
              phases={"train": 10, "finetune": 8})  # fmt: skip
    rows = rows_of(tmp_path)
    dense = [rows["dense10"], rows["dense14"]]
    assert peers.peers(rows["asked"], dense) == [rows["dense10"]]
    assert peers.peers(rows["longer"], dense) == [rows["dense10"]]
    assert not rows["asked"].kind.fits(rows["longer"].kind)
    circles = {frozenset(row.group for row in circle) for circle in peers.circles(rows.values())}
    expected = ("dense10", "asked"), ("dense10", "longer"), ("asked", "dense14")
    assert circles == {frozenset(names) for names in expected}
    for circle in peers.circles(rows.values()):
        assert all(one.kind.fits(other.kind) for one in circle for other in circle)


def test_fronts_are_drawn_within_a_kind(tmp_path):
    for width in (1.0, 0.25):
        for method, top1, macs in (("dense", 90.0, 100.0), ("rigl", 80.0, 20.0), ("set", 70.0, 30.0)):
            write_run(tmp_path, f"{method}{width}", method=method, model={"width": width}, top1=top1 * width,
                      macs__inference=macs * width)  # fmt: skip
    rows = list(rows_of(tmp_path).values())
    assert fronts(rows, "accuracy", "macs") == {"dense1.0", "rigl1.0", "dense0.25", "rigl0.25"}
    assert sorted([row.group for row in line] for _, line in front_lines(rows, "accuracy", "macs")) == [
        ["rigl0.25", "dense0.25"], ["rigl1.0", "dense1.0"],
    ]  # fmt: skip
    accuracy = figures.build(rows, Findings()).figures[0]
    labels = {series.label: series for series in accuracy.views[0].series}
    assert {"rigl width=1.0", "rigl width=0.25", "Pareto front width=1.0", "Pareto front width=0.25"} <= set(labels)
    looks = {(labels[name].style.color, labels[name].style.symbol) for name in ("rigl width=1.0", "rigl width=0.25")}
    assert len(looks) == 2
    assert styles.labels(rows)["set0.25"] == "set width=0.25"


def test_a_row_without_its_like_is_on_no_front(tmp_path):
    write_run(tmp_path, "a", macs__inference=1)
    write_run(tmp_path, "b", model={"width": 0.25}, macs__inference=1)
    assert fronts(list(rows_of(tmp_path).values()), "accuracy", "macs") == set()


def test_partly_evaluated_and_partly_trained_rows_are_marked_and_apart(tmp_path, capsys):
    write_run(tmp_path, "dense", method="dense", top1=92.0, macs__inference=9)
    write_run(tmp_path, "whole", top1=91.0, macs__inference=1)
    write_run(tmp_path, "part", top1=82.75, macs__inference=1, trainer={"limit_eval_batches": 4})
    write_run(tmp_path, "known", top1=83.0, macs__inference=1, final__images=1000, data__num_eval=10000)
    write_run(tmp_path, "all", top1=90.5, macs__inference=1, trainer={"limit_eval_batches": 20})
    write_run(tmp_path, "brief", top1=60.0, macs__inference=1, trainer={"limit_train_batches": 20})
    write_run(tmp_path, "told", top1=61.0, macs__inference=1, train__images_per_epoch=256, data__num_train=50000)
    rows = rows_of(tmp_path)
    assert {name: row.evaluated for name, row in rows.items() if row.evaluated} == {
        "part": "2,000 of 10,000", "known": "1,000 of 10,000",
    }  # fmt: skip
    assert {name: row.trained for name, row in rows.items() if row.trained} == {
        "brief": "2,560 of 50,000", "told": "256 of 50,000",
    }  # fmt: skip
    assert fronts(list(rows.values()), "accuracy", "macs") == {"dense", "whole"}
    assert "trainer.limit_eval_batches=4" in rows["part"].options.split()
    labels = styles.labels(list(rows.values()))
    assert labels["part"].endswith("(2,000 of 10,000 images)") and labels["brief"].endswith("(2,560 of 50,000 images)")
    names = styles.kind_names(list(rows.values()))
    assert (names["part"], names["whole"]) == ("(2,000 of 10,000 images)", "")
    assert main([str(tmp_path), "--baseline", "method=dense"]) == 0
    cells = {row["top-1 %"]: row for row in cells_of(capsys)}
    assert cells["82.75 (2,000 of 10,000 images)"]["against method=dense"] == "-"
    assert cells["60.00"]["schedule"] == "short (2,560 of 50,000 images)"
    assert cells["90.50"]["against method=dense"] == "-1.50 (1)"


def test_what_a_run_has_lost_is_taken_from_its_like_if_they_agree(tmp_path):
    write_run(tmp_path, "a")
    lost = write_run(tmp_path, "lost")
    run = json.loads((lost / "run.json").read_text())
    del run["config"]["model"]
    (lost / "run.json").write_text(json.dumps(run))
    rows = rows_of(tmp_path)
    assert rows["a"].kind.fits(rows["lost"].kind)
    write_run(tmp_path, "narrow", model={"width": 0.25})
    rows = rows_of(tmp_path)
    assert not rows["a"].kind.fits(rows["lost"].kind) and not rows["narrow"].kind.fits(rows["lost"].kind)


def test_the_study_has_one_front_over_both_ways_to_spend_three_epochs():
    rows = aggregate(read_runs([STUDY]))
    assert len(peers.circles(rows)) == 1
    assert set(styles.kind_names(rows).values()) == {""}
    header, _ = table(rows)
    assert re.match("epochs", header[4])


def test_figures_of_findings_are_those_of_the_table(tmp_path):
    write_run(tmp_path, "dense", method="dense", macs__inference=9, macs__train=10)
    write_run(tmp_path, "rigl", top1=91.0, macs__inference=1, macs__train=5)
    rows = list(rows_of(tmp_path).values())
    options = Namespace(baseline=None, cost="train", before_pruning=False, sort="name")
    found = find(rows, read_runs([tmp_path]), options)
    view = next(view for view in figures.build(rows, found).figures[0].views if view.key == "train")
    assert found.over_dense == {"dense": 1.0, "rigl": 0.5} and found.front == {"rigl"}
    assert [series.x for series in view.series if series.kind == "front"] == [(5,)]
