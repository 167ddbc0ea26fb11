"""The W&B copy, by the real wandb client: against a server on this machine, and from the offline file."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prune_lab.commands.dashboard import wandb_sync
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import jsonable, read_json
from prune_lab.tracking.jsonl import read_records
from prune_lab.tracking.wandb_key import find_key, resolve_mode
from tests.helpers.wandb_child import LAYERS, SUMMARY, record
from tests.helpers.wandb_server import API_KEY, WandbServer
from tests.helpers.wandb_user import call, online, user_environment

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture
def environment(tmp_path):
    """The variables of a user without any W&B account or settings."""
    return user_environment(tmp_path)


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


def start_child(*arguments, env):
    command = [sys.executable, str(HELPERS / "wandb_child.py"), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def end_child(process):
    """Return (last line as JSON, all output); fail on a traceback or a non-zero exit."""
    out, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return json.loads(out.splitlines()[-1]), out


def result_of(process):
    """Return (last line as JSON, all output) of a run whose end is tested, not the process's.

    At exit the wandb client goes on for some 15 s with a server that never answers.
    """
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("{"):
            break
    process.kill()
    _, err = process.communicate()
    assert "Traceback" not in err
    return json.loads(lines[-1]), "".join(lines)


def until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def expected(num_records):
    """What is copied of the child's records: NaN is null in the local file and left out in W&B."""
    rows = [jsonable(record(epoch)) for epoch in range(1, num_records + 1)]
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def own_keys(row):
    return {key: value for key, value in row.items() if not key.startswith("_")}


def test_online_run_arrives_whole(run_dir, environment):
    with WandbServer() as server:
        _, out = end_child(start_child(run_dir, "auto", 4, "finished", env=online(environment, server)))
        stored = server.runs["runid1"]
        uploads = {name: content for name, content in server.uploads.items() if name.startswith("artifact/")}
        assert f"W&B: {server.url}/tester/bench/runs/runid1" in out
    assert [own_keys(row) for row in stored.history] == expected(4)
    assert [row["_step"] for row in stored.history] == [0, 1, 2, 3]
    assert stored.summary["final/top1"] == SUMMARY["final/top1"]
    assert stored.summary["phases"] == SUMMARY["phases"]
    assert stored.summary["layers"]["nrows"] == len(LAYERS)
    assert stored.exit_code == 0
    assert stored.config["model"] == {"value": {"name": "resnet20"}}
    fields = stored.fields
    assert (fields["project"], fields["groupName"], fields["displayName"]) == ("bench", "group-a", "run-a")
    assert sorted(fields["tags"]) == ["digits", "t" * 64]
    (table,) = (json.loads(content) for content in uploads.values())
    assert table["columns"] == ["name", "shape", "density", "eligible"]
    assert table["data"] == [["conv1", "[16, 3, 3, 3]", 0.5, None], ["fc", None, None, False]]
    leaks = [path for path in run_dir.rglob("*") if path.is_file() and API_KEY.encode() in path.read_bytes()]
    assert leaks == []


def test_axes_are_defined(run_dir, environment):
    with WandbServer() as server:
        end_child(start_child(run_dir, "online", 1, "finished", env=online(environment, server)))
        metrics = server.runs["runid1"].config["_wandb"]["value"]["m"]
    names = [metric.get("1") or metric.get("2") for metric in metrics]  # fields of MetricRecord: name, glob_name
    assert {"global_step", "epoch", "macs/train", "*"} <= set(names)
    (every,) = (metric for metric in metrics if metric.get("2") == "*")
    axis = every["5"]  # step_metric_index, counted from 1
    assert names[axis - 1] == "global_step"


def test_interrupted_run_goes_on_in_the_same_place(run_dir, environment):
    with WandbServer() as server:
        end_child(start_child(run_dir, "online", 2, "interrupted", env=online(environment, server)))
        assert server.runs["runid1"].exit_code == 1
        end_child(start_child(run_dir, "online", 4, "finished", env=online(environment, server)))
        stored = server.runs["runid1"]
    assert [own_keys(row) for row in stored.history] == expected(4)
    assert stored.exit_code == 0


@pytest.mark.parametrize("mode", ["error", "hang"])
def test_server_that_fails_from_the_start(mode, run_dir, environment):
    with WandbServer() as server:
        server.mode = mode
        process = start_child(run_dir, "online", 4, "finished", env=online(environment, server))
        times, out = end_child(process) if mode == "error" else result_of(process)
    assert times["before_s"] < 1.5
    assert times["finish_s"] < 8
    assert out.count("W&B copy stopped: ") == 1
    assert read_json(run_dir / "status.json")["status"] == "finished"
    assert len(read_records(run_dir / "metrics.jsonl")) == 4


@pytest.mark.parametrize("mode", ["error", pytest.param("hang", marks=pytest.mark.slow)])
def test_server_that_fails_in_the_middle_is_made_good_by_a_refill(mode, run_dir, environment):
    with WandbServer() as server:
        process = start_child(run_dir, "online", 4, "finished", "half", env=online(environment, server))
        while process.stdout.readline().strip() != "half":
            pass
        until(lambda: "runid1" in server.runs)
        server.mode = mode
        process.stdin.write("\n")
        process.stdin.flush()
        times, out = result_of(process)
        assert times["before_s"] < 2
        assert times["finish_s"] < 8
        assert out.count("W&B copy stopped: ") == 1
        assert read_json(run_dir / "status.json")["status"] == "finished"
        server.mode = "ok"
        sent = sync(run_dir, env=online(environment, server))
        assert sent.returncode == 0, sent.stderr
        assert [own_keys(row) for row in server.runs["runid1"].history] == expected(4)
        assert server.runs["runid1"].summary["final/top1"] == SUMMARY["final/top1"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the client's helper process through /proc")
def test_client_process_that_dies_does_not_stop_the_run(run_dir, environment):
    with WandbServer() as server:
        process = start_child(run_dir, "online", 4, "finished", "half", env=online(environment, server))
        while process.stdout.readline().strip() != "half":
            pass
        until(lambda: "runid1" in server.runs)
        children = Path(f"/proc/{process.pid}/task").glob("*/children")
        helpers = [int(pid) for path in children for pid in path.read_text().split()]
        assert helpers
        for pid in helpers:
            os.kill(pid, signal.SIGKILL)
        process.stdin.write("\n")
        process.stdin.flush()
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert out.count("W&B copy stopped: ") == 1
    assert len(read_records(run_dir / "metrics.jsonl")) == 4


def sync(*arguments, env):
    return call("wandb-sync", *arguments, env=env)


def test_refill_sends_what_is_missing_and_nothing_twice(run_dir, environment):
    end_child(start_child(run_dir, "disabled", 4, "finished", env=environment))
    assert not (run_dir / "wandb").exists()
    with WandbServer() as server:
        env = online(environment, server)
        first = sync(run_dir, env=env)
        assert f"{run_dir}: 4 records sent, 0 there before: {server.url}" in first.stdout, first.stderr
        del server.runs["runid1"].history[3:]
        server.runs["runid1"].summary["_step"] = 2
        second = sync(run_dir, env=env)
        assert "1 records sent, 3 there before" in second.stdout
        assert [own_keys(row) for row in server.runs["runid1"].history] == expected(4)
        assert "4 records sent" in sync(run_dir, "--suffix", "b", "--project", "other", env=env).stdout
        assert server.runs["runid1-b"].fields["project"] == "other"
        assert [own_keys(row) for row in server.runs["runid1-b"].history] == expected(4)


def test_refill_takes_folders_and_goes_on_after_a_failure(run_dir, environment, tmp_path):
    end_child(start_child(run_dir, "disabled", 2, "finished", env=environment))
    folder = tmp_path / "outputs"
    for name in ("a-damaged", "b-run", "c-run"):
        shutil.copytree(run_dir, folder / name)
        run = read_json(run_dir / "run.json")
        (folder / name / "run.json").write_text(json.dumps(run | {"id": name}))
    (folder / "a-damaged" / "run.json").write_text('{"id": "a-damaged"}')
    (folder / "reference").mkdir()
    (folder / "reference" / "summary.json").write_text("{}")
    (folder / "dry").mkdir()
    (folder / "dry" / "dry_run.json").write_text("{}")
    with WandbServer() as server:
        env = online(environment, server)
        sent = sync(folder, env=env)
        assert sent.returncode == 1
        assert sent.stderr == f"prune-lab: error: {folder / 'a-damaged'}: run.json is not what a run writes ('name')\n"
        first, second, skipped, total = sent.stdout.splitlines()
        assert first.startswith(f"{folder / 'b-run'}: 2 records sent")
        assert second.startswith(f"{folder / 'c-run'}: 2 records sent")
        assert skipped == f"{folder / 'reference'}: skipped, it holds results without the run (no run.json)"
        assert total == "wandb-sync: 2 sent, 1 skipped, 1 failed"
        assert {name: [own_keys(row) for row in run.history] for name, run in server.runs.items()} == {
            "b-run": expected(2),
            "c-run": expected(2),
        }
        again = sync(folder / "[bc]-*", env=env)
        assert again.returncode == 0
        assert again.stdout.endswith("wandb-sync: 2 sent, 0 skipped, 0 failed\n")
        assert "0 records sent, 2 there before" in again.stdout


def test_refill_skips_a_run_under_way_and_sends_one_that_was_killed(run_dir, environment):
    end_child(start_child(run_dir, "disabled", 2, "interrupted", env=environment))
    with WandbServer() as server, open(run_dir / ".lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        skipped = sync(run_dir, env=online(environment, server))
        assert skipped.returncode == 0, skipped.stderr
        assert skipped.stdout == f"{run_dir}: running, skipped\nwandb-sync: 0 sent, 1 skipped, 0 failed\n"
        assert server.runs == {}
        fcntl.flock(held, fcntl.LOCK_UN)  # as the system does when the process dies
        sent = sync(run_dir, env=online(environment, server))
        assert f"{run_dir}: 2 records sent" in sent.stdout, sent.stderr
        assert server.runs["runid1"].exit_code == 1


def test_refill_says_what_is_wrong_in_one_line(run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    with pytest.raises(UserError, match="run: no such run or folder"):
        wandb_sync.main([str(run_dir)])
    run_dir.mkdir()
    (run_dir / "dry_run.json").write_text("{}")
    with pytest.raises(UserError, match="no runs in .*run"):
        wandb_sync.main([str(run_dir)])
    with pytest.raises(UserError, match=r"run is not the directory of a run \(no run.json\)"):
        wandb_sync.refill(run_dir)
    (run_dir / "run.json").write_text("{")
    with pytest.raises(UserError, match="run cannot be read: "):
        wandb_sync.refill(run_dir)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(UserError, match="prune-lab wandb-sync needs a W&B key"):
        wandb_sync.main([str(run_dir)])


def test_offline_file_holds_the_same_records(run_dir, environment):
    for num_records, status in ((2, "interrupted"), (4, "finished")):
        end_child(start_child(run_dir, "auto", num_records, status, env=environment))
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")  # only the newest: it begins with the same records
    messages = list(read_offline(path))
    rows = [{item_key(item): json.loads(item.value_json) for item in message.history.item}
            for message in messages if message.WhichOneof("record_type") == "history"]  # fmt: skip
    assert [own_keys(row) for row in rows] == expected(4)
    summary = {}
    for message in messages:
        summary |= {item_key(item): json.loads(item.value_json) for item in message.summary.update}
    assert summary["final/top1"] == SUMMARY["final/top1"]
    (run,) = {message.run.run_id: message.run for message in messages if message.HasField("run")}.values()
    assert (run.run_id, run.run_group, run.display_name) == ("runid1", "group-a", "run-a")


def item_key(item):
    return item.key or "/".join(item.nested_key)


def read_offline(path):
    """Yield the messages of a .wandb file: LevelDB log format, 7 bytes of header, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole message, or the last part of it
            yield Record.FromString(parts)
            parts = b""


def test_mode_is_found_without_network_or_prompt(tmp_path):
    netrc = tmp_path / "netrc"
    own, lab = "machine api.wandb.ai\n  login user\n  password", "machine lab.local:8080 login user password other"
    netrc.write_text(f"{own} {API_KEY}\n{lab}\n")
    nothing = {"NETRC": str(tmp_path / "none"), "WANDB_CONFIG_DIR": str(tmp_path)}
    stored = nothing | {"NETRC": str(netrc)}
    assert resolve_mode("auto", nothing) == "offline"
    assert resolve_mode("auto", nothing | {"WANDB_API_KEY": API_KEY}) == "online"
    assert resolve_mode("auto", stored) == "online"
    assert resolve_mode("auto", stored | {"WANDB_MODE": "disabled"}) == "disabled"
    assert resolve_mode("offline", stored) == "offline"
    assert find_key(stored | {"WANDB_BASE_URL": "http://lab.local:8080"}) == "other"
    assert find_key(stored | {"WANDB_BASE_URL": "http://elsewhere"}) is None
    (tmp_path / "settings").write_text("[default]\nbase_url = http://lab.local:8080\n")
    assert find_key(stored) == "other"
    with pytest.raises(UserError, match="logger.wandb=online needs a W&B key"):
        resolve_mode("online", nothing)
