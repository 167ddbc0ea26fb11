"""Options that follow the length of the schedule: the published number on the papers' schedules, a fitting one else."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_lab import datasets
from prune_lab.config.run import as_mapping
from prune_lab.core.method import build_method
from prune_lab.core.phase import TRAIN
from prune_lab.pipeline import identity
from prune_lab.pipeline.settling import settled
from prune_lab.pruning.masks.sparsity_schedules import fitting_interval
from prune_lab.tracking.lines import summary_rows
from tests.helpers.method_runs import configure, finish, run_folder, summary
from tests.helpers.runs import compose

DYNAMIC = ("rigl", "rigl_structured", "rigl_itop", "set", "set_itop", "dst_ee", "snfs")


def settle(*options: str):
    config = compose(*options)
    return settled(config, datasets.describe(config.dataset))


def num_updates(method, total: int) -> int:
    return method._num_updates(total, method.config.interval)


@pytest.mark.parametrize("name", DYNAMIC)
def test_the_demo_leaves_ten_updates_or_more(name: str) -> None:
    method = build_method(settle(f"method={name}"))
    assert num_updates(method, 176) >= 10 > method._num_updates(176, method.config.interval + 1)


@pytest.mark.parametrize(("name", "data", "interval"), [
    ("rigl", "imagenet", 100), ("rigl", "cifar10", 100), ("set", "cifar10", 100), ("dst_ee", "imagenet", 100),
    ("rigl_structured", "cifar10", 100), ("rigl_itop", "imagenet", 4000), ("rigl_itop", "cifar10", 4000),
    ("set_itop", "cifar10", 1500), ("snfs", "cifar10", 390),
])  # fmt: skip
def test_published_intervals_hold_on_long_schedules(name: str, data: str, interval: int) -> None:
    schedule = ["schedule=cifar_250"] if data == "cifar10" else []
    assert settle(f"method={name}", f"dataset={data}", *schedule).method.interval == interval


def test_a_typed_interval_stays_and_shares_its_phases_with_the_same_one_found() -> None:
    found, typed = settle("method=rigl"), settle("method=rigl", "method.interval=14")
    assert found.method.interval == as_mapping(found)["method"]["interval"] == 14
    assert build_method(found).phase_identity(TRAIN) == build_method(typed).phase_identity(TRAIN)
    assert settle("method=rigl", "method.interval=100").method.interval == 100
    keys = [identity.plan_phases(config, model=config.model, fingerprint="a", device_config={}, world_size=1)[-1].key
            for config in (found, typed)]  # fmt: skip
    assert keys[0] == keys[1]


@pytest.mark.parametrize(("longest", "wanted", "interval"), [(100, 10, 13), (12, 10, 12), (100, 200, None)])
def test_the_longest_fitting_interval(longest: int, wanted: int, interval: int | None) -> None:
    assert fitting_interval(longest, lambda every: 130 // every, wanted=wanted) == interval


def test_few_updates_are_warned_of_with_an_interval_that_leaves_more(tmp_path: Path) -> None:
    # nine steps, updates below step 6: at 0 and 3
    config = configure(tmp_path, "rigl", "method.interval=3", "schedule.train.epochs=10", "method.end=0.5")
    finish(config)
    log = (run_folder(config) / "log.txt").read_text()
    said = "mask updates: 5, at steps 0, 3, 6, 9, 12 of 30; warning: fewer than 10, little else than a fixed mask: "
    assert said + "method.interval=1 leaves 10 or more" in log


def test_positions_tried_are_told_of_masks_that_move_only(tmp_path: Path) -> None:
    fixed = dict(summary_rows(summary(finish(configure(tmp_path / "a", "gmp")))))
    moved = dict(summary_rows(summary(finish(configure(tmp_path / "b", "set")))))
    assert fixed["masks"].endswith(" dead filters") and "tried" not in fixed["masks"]
    assert "of positions tried" in moved["masks"]
