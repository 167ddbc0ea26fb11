"""The local files are the truth: valid JSON, whole or not at all, one flushed line per record."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from prune_lab.foundations.files import jsonable, read_json, write_json
from prune_lab.tracking import RunInfo
from prune_lab.tracking.jsonl import JsonFiles, append_record, read_records, rewrite


def info_for(run_dir):
    return RunInfo(run_dir, "id1", "run-a", "group-a", ["digits"], {"seed": 0}, [{"name": "train", "epochs": 2}])


def test_numbers_without_json_form_become_null():
    class Scalar:
        def item(self):
            return float("inf")

    value = {"a": float("nan"), "b": [1, (2.5, float("-inf"))], 3: Scalar(), "d": True}
    assert jsonable(value) == {"a": None, "b": [1, [2.5, None]], "3": None, "d": True}
    with pytest.raises(TypeError, match="a set cannot be written as JSON"):
        jsonable({"x": {1}})


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_line_cut_short_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_record(path, {"epoch": 1})
    append_record(path, {"epoch": 2, "train/loss": float("nan")})
    whole = path.read_bytes()
    for cut in range(len(b'{"epoch": 1}\n') + 1, len(whole) - 2):
        path.write_bytes(whole[:cut])
        assert read_records(path) == [{"epoch": 1}]
    path.write_bytes(whole)
    assert read_records(path) == [{"epoch": 1}, {"epoch": 2, "train/loss": None}]


def test_broken_line_within_the_file_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a":\n{"a": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_records(path)


def test_rewrite_replaces_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for epoch in range(4):
        append_record(path, {"epoch": epoch})
    rewrite(path, [record for record in read_records(path) if record["epoch"] < 2])
    assert [record["epoch"] for record in read_records(path)] == [0, 1]


def test_run_directory_of_a_whole_run(tmp_path):
    sink = JsonFiles()
    sink.start(info_for(tmp_path))
    assert read_json(tmp_path / "status.json") == {"status": "running", "error": None}
    sink.log({"phase": "train", "epoch": 1, "global_step": 5, "lr": 0.1})
    assert read_records(tmp_path / "metrics.jsonl")[0]["lr"] == 0.1  # before the file is closed
    sink.layers([{"name": "conv1", "shape": [3, 3]}])
    sink.summary({"final/top1": 90.0, "delta/top1": None})
    sink.finish("finished", None)
    assert read_json(tmp_path / "layers.json") == [{"name": "conv1", "shape": [3, 3]}]
    assert read_json(tmp_path / "summary.json") == {"final/top1": 90.0, "delta/top1": None}
    assert read_json(tmp_path / "status.json") == {"status": "finished", "error": None}
    assert read_json(tmp_path / "run.json") == {
        "id": "id1",
        "name": "run-a",
        "group": "group-a",
        "tags": ["digits"],
        "plan": [{"name": "train", "epochs": 2}],
        "config": {"seed": 0},
    }


def test_run_that_begins_again_writes_its_records_once(tmp_path):
    for num_records, status in ((2, "interrupted"), (3, "finished")):
        sink = JsonFiles()
        sink.start(info_for(tmp_path))
        for epoch in range(num_records):
            sink.log({"phase": "train", "epoch": epoch, "global_step": epoch})
        sink.finish(status, None)
    assert [record["epoch"] for record in read_records(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_records_survive_a_kill(tmp_path):
    code = (
        "import os, pathlib, sys\n"
        "from prune_lab.tracking import RunInfo\n"
        "from prune_lab.tracking.jsonl import JsonFiles\n"
        "sink = JsonFiles(); sink.start(RunInfo(pathlib.Path(sys.argv[1]), 'i', 'n', 'g'))\n"
        "for epoch in range(3): sink.log({'epoch': epoch})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == -9
    assert [json.loads(line)["epoch"] for line in open(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert read_json(tmp_path / "status.json")["status"] == "running"
