"""Runs and phases by content: done once, reused, refused, locked, and what a finished run leaves behind."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import prune_lab
from prune_lab import datasets
from prune_lab.datasets import BatchFormat
from prune_lab.datasets.in_memory import InMemoryDataset
from prune_lab.foundations import checkpoint, files, locks
from prune_lab.foundations.errors import UserError
from prune_lab.methods.magnitude import Magnitude
from prune_lab.pipeline import results, store, stored_phases
from prune_lab.tracking.jsonl import JsonFiles
from prune_lab.training.device_config import DeviceConfig
from prune_lab.training.evaluation import measure
from tests.helpers.runs import (
    METHODS,
    TINY,
    assert_same_run,
    compose,
    damage,
    execute,
    fork_run,
    records,
    run_dir,
    status,
    summary,
    wait_for,
)  # fmt: skip

KEYS = {
    "status", "run/id", "run/seed", "run/command", "run/device", "run/versions", "config/model", "config/dataset",
    "config/method", "config/schedule", "final/top1", "final/top5", "final/loss", "dense/top1", "delta/top1",
    "sparsity/requested", "sparsity/achieved", "params/dense", "params/total", "params/nonzero", "macs/dense",
    "macs/inference", "macs/inference_ratio", "macs/train", "macs/train_dense", "macs/train_ratio", "phases",
    "time/wall_s", "time/images_per_s", "dense/epochs", "data/num_eval", "final/images", "train/images_per_epoch",
}  # fmt: skip


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files_there = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files_there}


@pytest.mark.thin(4)
@pytest.mark.parametrize("method", METHODS)
def test_summary_has_every_key_and_files_are_all_there(tmp_path, method):
    assert execute(tmp_path, *TINY, *METHODS[method]) == 0
    flat = summary(tmp_path)
    assert flat.keys() >= KEYS and flat["status"] == "finished"
    assert [phase.keys() >= {"name", "key", "epochs", "reused", "wall_s"} for phase in flat["phases"]]
    directory = run_dir(tmp_path)
    for name in ("config.yaml", "metrics.jsonl", "layers.json", "summary.json", "model.safetensors", "model.json",
                 "log.txt", "status.json"):  # fmt: skip
        assert (directory / name).is_file(), name
    assert status(tmp_path) == {"status": "finished", "error": None}
    for row in records(directory):
        assert list(row)[:3] == ["phase", "epoch", "global_step"]
    for index, phase in enumerate(flat["phases"]):
        assert (directory / "phases" / f"{index}-{phase['name']}" / "phase.json").is_file()
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("checkpoint*"))


@pytest.mark.parametrize("method", ["dense", "rigl", "magnitude", "small_dense"])
def test_load_rebuilds_the_network_with_exactly_the_reported_accuracy(tmp_path, method):
    assert execute(tmp_path, *TINY, *METHODS[method], "trainer.eval_batch_size=7") == 0
    config, fp32 = compose(*TINY), DeviceConfig("cpu", "fp32", False, False)
    data = datasets.load(config.dataset, BatchFormat(torch.device("cpu"), torch.float32, False))
    model = prune_lab.load(run_dir(tmp_path))
    scores = measure(model, data, "test", device_config=fp32, trainer=config.trainer)
    flat = summary(tmp_path)
    assert scores["top1"] == flat["final/top1"] and scores["top5"] == flat["final/top5"]
    assert scores["loss"] == pytest.approx(flat["final/loss"], rel=1e-5)
    zeros = sum(int((p == 0).sum()) for name, p in model.named_parameters() if p.dim() > 1)
    assert zeros >= flat["params/total"] - flat["params/nonzero"]


def test_second_call_says_done_and_changes_nothing(tmp_path, capsys):
    assert execute(tmp_path, *TINY, *METHODS["rigl"]) == 0
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert execute(tmp_path, *TINY, *METHODS["rigl"]) == 0
    assert "done already" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


def test_a_dense_phase_is_trained_once_for_all_that_start_from_it(tmp_path):
    assert execute(tmp_path / "alone", *TINY, "method=magnitude", "method.sparsity=0.5") == 0
    for options in (("method=dense",), ("method=magnitude", "method.sparsity=0.5"), ("method=magnitude",)):
        assert execute(tmp_path / "all", *TINY, *options) == 0
    found = [json.loads(path.read_text()) for path in (tmp_path / "all").glob("*/summary.json")]
    by_sparsity = {flat["sparsity/requested"]: flat for flat in found}
    assert len({flat["phases"][0]["key"] for flat in found}) == 1
    assert [phase["reused"] for phase in by_sparsity[None]["phases"]] == [False]
    assert [phase["reused"] for phase in by_sparsity[0.9]["phases"]] == [True, False, False]
    dense = by_sparsity[None]["macs/train"]
    assert by_sparsity[None]["macs/train_ratio"] == 1.0
    for sparsity in (0.5, 0.9):
        flat = by_sparsity[sparsity]
        assert flat["macs/train"] > dense  # the reused phase counts
        assert flat["dense/top1"] == by_sparsity[None]["final/top1"]
        assert flat["delta/top1"] == flat["final/top1"] - flat["dense/top1"]
    alone = summary(tmp_path / "alone")
    for key in ("final/top1", "final/loss", "macs/train", "dense/top1"):
        assert by_sparsity[0.5][key] == alone[key]  # reuse changes no figure


def test_records_of_a_reused_phase_come_with_the_run(tmp_path):
    assert execute(tmp_path, *TINY, "method=dense") == 0
    assert execute(tmp_path, *TINY, "method=magnitude") == 0
    paths = {json.loads((path / "run.json").read_text())["name"].split("-")[2]: path
             for path in (entry.parent for entry in tmp_path.glob("*/run.json"))}  # fmt: skip
    rows = records(paths["magnitude"])
    assert [(row["phase"], row["epoch"], row["global_step"]) for row in rows] == [
        ("train", 1, 6), ("train", 2, 12), ("prune", 0, 12), ("finetune", 1, 18), ("final", 0, 18)]  # fmt: skip
    assert rows[:2] == records(paths["dense"])[:2]
    spent = [row["macs/train"] for row in rows if "macs/train" in row]
    total = json.loads((paths["magnitude"] / "summary.json").read_text())["macs/train"]
    assert spent == sorted(spent) and spent[-1] == total


def test_validation_uses_no_test_image_before_the_end(tmp_path, monkeypatch):
    asked = []
    real = InMemoryDataset.eval_batches

    def eval_batches(self, split, *arguments, **options):
        asked.append(split)
        return real(self, split, *arguments, **options)

    monkeypatch.setattr(InMemoryDataset, "eval_batches", eval_batches)
    assert execute(tmp_path, *TINY, *METHODS["magnitude"], "dataset.validation=0.25") == 0
    assert asked[-1] == "test" and set(asked[:-1]) == {"val"}
    flat = summary(tmp_path)
    assert {"test/top1", "test/top5", "test/loss", "final/top1"} <= flat.keys()
    assert flat["test/loss"] != flat["final/loss"]


def test_without_validation_there_is_no_second_score(tmp_path):
    assert execute(tmp_path, *TINY) == 0
    assert not [key for key in summary(tmp_path) if key.startswith("test/")]


def test_directory_of_another_configuration_is_refused_and_left_alone(tmp_path):
    assert execute(tmp_path, *TINY) == 0
    path = run_dir(tmp_path) / "run.json"
    path.write_text(path.read_text().replace(json.loads(path.read_text())["id"], "0" * 32))
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="written by another configuration") as refusal:
        execute(tmp_path, *TINY)
    assert "\n" not in str(refusal.value)
    assert snapshot(tmp_path) == before


def test_output_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir.*is a file"):
        execute(tmp_path / "file", *TINY)


def test_damaged_result_of_a_phase_is_done_again(tmp_path, capsys):
    assert execute(tmp_path / "run", *TINY, "method=dense") == 0
    (result,) = (tmp_path / "run").glob("phases/*/result.pt")
    damage(result, "flip")
    assert execute(tmp_path / "run", *TINY, "method=magnitude") == 0
    assert "is damaged" in capsys.readouterr().out
    assert execute(tmp_path / "other", *TINY, "method=magnitude") == 0
    paths = [next(iter((tmp_path / name).glob("*magnitude*"))) for name in ("run", "other")]
    assert records(paths[0]) == records(paths[1])


def test_a_lost_model_is_written_again_from_the_stored_phases(tmp_path):
    assert execute(tmp_path, *TINY) == 0
    before = load_file(run_dir(tmp_path) / "model.safetensors")
    (run_dir(tmp_path) / "model.safetensors").unlink()
    assert execute(tmp_path, *TINY) == 0
    after = load_file(run_dir(tmp_path) / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [phase["reused"] for phase in summary(tmp_path)["phases"]] == [True]


def test_state_of_one_phase_never_leaks_into_the_next(tmp_path, monkeypatch):
    """Each phase gets a method of its own, whether the phase before ran in this process or not."""
    marks = []
    real = Magnitude.prune

    def prune(self, context):
        self.mark = True
        real(self, context)

    monkeypatch.setattr(Magnitude, "prune", prune)
    monkeypatch.setattr(Magnitude, "setup", lambda self, context: marks.append(hasattr(self, "mark")))
    assert execute(tmp_path, *TINY, "method=magnitude") == 0
    assert marks == [False, False]


def full_disk(*_arguments, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.thin(3)
@pytest.mark.parametrize("where", ["checkpoint", "record", "run record", "phase figures", "model", "status"])
def test_full_disk_ends_in_one_line_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys, where):
    def refuse(path, *_arguments):
        raise files.SaveError(errno.ENOSPC, f"cannot write {path}: {os.strerror(errno.ENOSPC)}")

    if where == "checkpoint":
        real, calls = checkpoint.write_file, []

        def write_file(path, fill):
            calls.append(path)
            return refuse(path) if len(calls) == 2 else real(path, fill)

        monkeypatch.setattr(checkpoint, "write_file", write_file)
    elif where == "record":
        monkeypatch.setattr(store, "append_record", full_disk)
    elif where == "run record":
        monkeypatch.setattr(JsonFiles, "log", full_disk)
    elif where == "phase figures":
        monkeypatch.setattr(store, "write_json", refuse)
    elif where == "model":
        monkeypatch.setattr("prune_lab.pipeline.saved_model.write_bytes", refuse)
    else:
        monkeypatch.setattr(JsonFiles, "finish", full_disk)
    assert execute(tmp_path / "cut", *TINY, *METHODS["rigl"], "trainer.checkpoint_interval_s=1e-9") == 1
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    (line,) = [line for line in shown.out.splitlines() if line.startswith("failed: ")]
    assert "No space left on device" in line
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.tmp"))
    assert execute(tmp_path / "cut", *TINY, *METHODS["rigl"]) == 0
    assert execute(tmp_path / "whole", *TINY, *METHODS["rigl"]) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_two_processes_with_the_same_command_and_one_with_the_same_phase(tmp_path):
    """All at once: one trains, the others wait; nothing is done twice or mixed up."""
    both = tmp_path / "both"
    children = [fork_run(both, *TINY, f"method={method}") for method in ("dense", "dense", "magnitude")]
    assert [wait_for(child) for child in children] == [0, 0, 0]
    shown = [path.read_text() for path in tmp_path.glob("both.*.log")]
    assert sum("done already" in text for text in shown) == 1
    flats = [json.loads(path.read_text()) for path in (tmp_path / "both").glob("*/summary.json")]
    assert sorted(flat["phases"][0]["reused"] for flat in flats) == [False, True]
    assert execute(tmp_path / "alone", *TINY, "method=dense") == 0
    (dense,) = [flat for flat in flats if flat["config/method"] == "dense"]
    for key in ("final/top1", "final/loss", "macs/train"):
        assert dense[key] == summary(tmp_path / "alone")[key]
    (path,) = (tmp_path / "both").glob("*dense*/metrics.jsonl")
    assert records(path.parent) == records(run_dir(tmp_path / "alone"))


def test_a_waiting_run_says_so_and_goes_on_when_the_phase_is_there(tmp_path, monkeypatch, capsys):
    config = compose(*TINY, f"output_dir={tmp_path}")
    assert execute(tmp_path, *TINY, "method=dense") == 0
    (key,) = [path.parent.name for path in tmp_path.glob("phases/*/phase.json")]
    held = store.PhaseStore(Path(config.output_dir), key, print)
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with held.lock(what="", poll=lambda: None):
            entered.set()
            leave.wait(60)

    monkeypatch.setattr(locks.time, "sleep", lambda _seconds: leave.set())
    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(60)
    assert execute(tmp_path, *TINY, "method=magnitude") == 0
    thread.join()
    assert "waiting for another process that is working on phase train" in capsys.readouterr().out


def test_wrong_zeros_are_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    mask = torch.tensor([[True, False], [True, True]])
    with pytest.raises(RuntimeError, match="pruned weights are not zero in 0.weight"):
        results.check_zeros(model, {"0.weight": mask})
    model[0].weight.data[0, 1] = 0
    results.check_zeros(model, {"0.weight": mask})


def test_an_unforeseen_error_is_a_failed_run_with_the_traceback_in_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_phases, "perform", lambda job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        execute(tmp_path, *TINY)
    assert status(tmp_path) == {"status": "failed", "error": "ZeroDivisionError: division by zero"}
    assert "Traceback" in (run_dir(tmp_path) / "log.txt").read_text()


def test_the_cut_network_is_measured_and_recorded(tmp_path):
    execute(tmp_path, *TINY, "method=magnitude", "method.sparsity=0.8")
    records = [json.loads(line) for line in (run_dir(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    (cut,) = [record for record in records if record["phase"] == "prune"]
    dense = [record for record in records if record["phase"] == "train"][-1]
    assert cut["global_step"] == dense["global_step"] and cut["macs/inference"] < dense["macs/inference"]
    assert 0 <= cut["eval/top1"] <= 100 and cut["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_the_last_epoch_and_the_summary_state_one_number(tmp_path):
    execute(tmp_path, *TINY, "method=rigl", "method.interval=2", "trainer.precision=bf16")
    records = [json.loads(line) for line in (run_dir(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["phase"] == "train"][-1]
    final = summary(tmp_path)
    assert (last["eval/loss"], last["eval/top1"]) == (final["final/loss"], final["final/top1"])


@pytest.mark.parametrize("method", ["magnitude", "gmp"])
def test_a_global_cut_below_one_weight_per_layer_is_refused(tmp_path, method):
    options = ("method.distribution=global", "method.sparsity=0.99999")
    cuts = ("method.num_cuts=3",) if method == "gmp" else ()
    with pytest.raises(UserError, match="method.sparsity=0.99999 leaves 0 weights for 20 layers"):
        execute(tmp_path, *TINY, f"method={method}", *options, *cuts)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_of_another_configuration_is_not_taken_for_this_one(tmp_path):
    execute(tmp_path, *TINY, "method=static", "method.sparsity=0.8")
    directory = run_dir(tmp_path)
    written = json.loads((directory / "summary.json").read_text())
    (directory / "summary.json").write_text(json.dumps(written | {"run/id": "another"}))
    (directory / "run.json").unlink()
    with pytest.raises(UserError, match="was written by another configuration"):
        execute(tmp_path, *TINY, "method=static", "method.sparsity=0.8")


def test_what_was_left_out_of_the_images_is_counted(tmp_path):
    limits = ("trainer.limit_eval_batches=2", "trainer.eval_batch_size=5", "trainer.limit_train_batches=2")
    options = ("dataset.num_train=64", "dataset.num_test=32", "dataset.validation=0.25", "schedule.batch_size=8")
    assert execute(tmp_path / "part", *TINY, *METHODS["dense"], *options, *limits) == 0
    found = summary(tmp_path / "part")
    keys = ("final/images", "data/num_eval", "test/images", "data/num_test", "train/images_per_epoch", "data/num_train")
    assert [found[key] for key in keys] == [10, 16, 10, 32, 16, 48]
    unlimited = ("trainer.limit_eval_batches=null", "trainer.limit_train_batches=6")  # 48 images are 6 batches
    assert execute(tmp_path / "whole", *TINY, *METHODS["dense"], *options, *unlimited) == 0
    found = summary(tmp_path / "whole")
    assert [found[key] for key in keys] == [16, 16, 32, 32, None, 48]
    part, whole = (run_dir(tmp_path / name).joinpath("log.txt").read_text() for name in ("part", "whole"))
    assert "of 10 of 16 images" in part
    assert re.search(r"train 1/\d+ .*  top1 \d+\.\d+ \(16 images\).*  eval top1 \d+\.\d+ \(10 images\)", part)
    assert "images)" not in whole
