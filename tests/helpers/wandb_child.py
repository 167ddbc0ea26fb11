"""A small run in a process of its own: python wandb_child.py RUN_DIR MODE NUM_RECORDS STATUS [half].

With `half` it waits for a line on standard input in the middle, for the server to change its mind.
Its last line of output is JSON: seconds until `finish` was called, and seconds that took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from prune_lab.tracking import RunInfo, open_tracker

LAYERS = [{"name": "conv1", "shape": [16, 3, 3, 3], "density": 0.5}, {"name": "fc", "eligible": False}]
SUMMARY = {"final/top1": 92.0, "delta/top1": None, "phases": [{"name": "train", "epochs": 4}]}


def record(epoch: int) -> dict:
    return {
        "phase": "train",
        "epoch": epoch,
        "global_step": 10 * epoch,
        "eval/top1": 90.0 + epoch,
        "train/loss": float("nan") if epoch == 2 else 1 / epoch,
        "macs/train": 1000 * epoch,
    }


def main(run_dir: str, mode: str, num_records: str, status: str, *half: str) -> None:
    logger = SimpleNamespace(wandb=mode, project="bench", entity=None, tags=[])
    config = {"seed": 0, "model": {"name": "resnet20"}, "logger": {"project": "bench", "entity": None}}
    started = time.monotonic()
    tracker = open_tracker(logger, init_timeout_s=2, finish_timeout_s=2)
    plan = [{"name": "train", "epochs": 4}]
    tracker.start(RunInfo(Path(run_dir), "runid1", "run-a", "group-a", ["digits", "t" * 70], config, plan))
    for epoch in range(1, int(num_records) + 1):
        tracker.log(record(epoch))
        if half and epoch == int(num_records) // 2:
            print("half", flush=True)
            started += _wait()
    if status == "finished":
        tracker.layers(LAYERS)
        tracker.summary(SUMMARY)
    called = time.monotonic()
    tracker.finish(status, None)
    print(json.dumps({"before_s": called - started, "finish_s": time.monotonic() - called}))


def _wait() -> float:
    waited = time.monotonic()
    sys.stdin.readline()
    return time.monotonic() - waited


if __name__ == "__main__":
    main(*sys.argv[1:])
