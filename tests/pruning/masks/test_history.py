"""What a phase notes about its masks, and the schedules that explore to the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prune_lab.cli import command as cli
from prune_lab.pruning.masks.history import MaskHistory
from prune_lab.training.loop import TrainState
from tests.helpers.method_runs import configure, finish, make, summary, watch


def mask(*active: int, size: int = 10) -> torch.Tensor:
    result = torch.zeros(size, dtype=torch.bool)
    result[list(active)] = True
    return result.view(2, -1)


def test_exploration_of_the_example():
    """N 10, {0,1,2}; 2 goes, 5 comes; 5 goes, 2 comes back: R_s 0.3, 0.4, 0.4."""
    steps = [mask(0, 1, 2), mask(0, 1, 5), mask(0, 1, 2)]
    history = MaskHistory({"fc.weight": steps[0]})
    explored, overlaps = [], []
    for step in steps:
        history.observe({"fc.weight": step})
        figures = history.figures({"fc.weight": step})
        explored.append(figures["mask/exploration"])
        overlaps.append(figures["mask/overlap"])
        assert figures["mask/exploration/fc"] == figures["mask/exploration"]
        assert figures["mask/density/fc"] == pytest.approx(0.3)
    assert explored == pytest.approx([0.3, 0.4, 0.4])
    assert overlaps == pytest.approx([1, 2 / 3, 1])


def test_dead_filters_are_rows_without_a_weight():
    masks = {"a.weight": mask(0, 1), "b.weight": torch.zeros(3, 4, 3, 3, dtype=torch.bool)}
    masks["b.weight"][1, 2, 0, 0] = True
    assert MaskHistory(masks).figures(masks)["mask/dead_filters"] == 1 + 2


def test_what_a_history_saves_it_takes_back():
    history = MaskHistory({"w": mask(0, 1)})
    history.observe({"w": mask(5)})
    other = MaskHistory({"w": mask(7, 8)})
    other.load_state_dict(history.state_dict())
    assert torch.equal(other.ever["w"], mask(0, 1, 5)) and torch.equal(other.initial["w"], mask(0, 1))


def rows(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["phase"] == "train"]


@pytest.mark.parametrize("name", ["rigl", "set", "snfs", "dst_ee", "rigl_itop", "set_itop"])
def test_dynamic_methods_log_what_explains_them(name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, list] = {"first": [], "ever": [], "counts": []}

    def look(training: TrainState, step: int) -> None:
        flat = torch.cat([m.flatten() for m in training.context.masks.masks.values()])
        seen["ever"].append(flat if not seen["ever"] else seen["ever"][-1] | flat)
        seen["counts"].append(int(flat.sum()))

    watch(monkeypatch, look)
    written = rows(finish(configure(tmp_path, name, "method.alpha=0.5")))
    ever = [row["mask/exploration"] for row in written]
    assert ever == sorted(ever) and ever[0] >= 0.2 and ever[-1] > 0.2
    last = written[-1]
    explored = float(seen["ever"][-1].double().mean())
    if name in ("rigl", "set", "dst_ee"):  # the update at step 0 comes before the first look
        assert last["mask/exploration"] > explored
    else:
        assert last["mask/exploration"] == pytest.approx(explored)
    assert last["mask/dropped"] == last["mask/regrown"] + last["mask/grown"] or name == "snfs"
    assert last["mask/dropped"] > 0 and last["mask/grown"] > 0
    assert last["mask/overlap"] < 1
    assert {"mask/dead_filters", "mask/density/conv1", "mask/exploration/conv1"} <= set(last)


def test_static_masks_explore_nothing_and_gradual_pruning_starts_with_all(tmp_path: Path):
    static = rows(finish(configure(tmp_path / "static", "static")))
    assert [row["mask/exploration"] for row in static] == pytest.approx([1 - row["sparsity"] for row in static])
    assert {row["mask/overlap"] for row in static} == {1.0}
    gradual = rows(finish(configure(tmp_path / "gmp", "gmp")))
    assert {row["mask/exploration"] for row in gradual} == {1.0}


def test_the_summary_holds_the_figures_of_the_finished_masks(tmp_path: Path):
    folder = finish(configure(tmp_path, "snip"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    written, last = summary(folder), records[-2]
    for key in ("mask/exploration", "mask/overlap", "mask/dead_filters"):
        assert written[key] == last[key]
    assert written["prune/gradient_norm_before"] == records[0]["prune/gradient_norm_before"] > 0
    shown = (folder / "log.txt").read_text()
    assert "of positions tried" not in shown and " dead filters" in shown and "pruned, at initialisation" in shown


def test_random_scores_cost_no_scoring_pass(tmp_path: Path):
    scored, drawn = (
        json.loads((finish(configure(tmp_path / control, "snip", *options)) / "metrics.jsonl").open().readline())
        for control, options in (("none", ()), ("random", ("method.control=random",)))
    )
    assert scored["macs/train"] > 0 == drawn["macs/train"]


# ITOP


@pytest.mark.parametrize("name", ["rigl_itop", "set_itop"])
def test_itop_updates_after_each_interval_until_the_end(name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    digests: list[str] = []
    watch(monkeypatch, lambda training, step: digests.append(training.context.masks.digest()))
    finish(configure(tmp_path, name, "method.alpha=0.9", "method.floor=0.5"))  # 9 steps, interval 2
    changed = [step for step in range(1, 9) if digests[step] != digests[step - 1]]
    assert changed == [1, 3, 5, 7]  # after 2, 4, 6 and 8 steps; steps count from 0


def test_itop_fraction_falls_from_alpha_to_its_floor():
    method = make("rigl_itop")
    context = type("Context", (), {"total_steps": 1000, "steps_per_epoch": 100})()
    values = [method.moved_fraction(context, step) for step in (0, 500, 1000)]
    assert values == pytest.approx([0.5, (0.5 + 0.005) / 2, 0.005])


def test_unfired_positions_grow_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    explored = {}
    for growth in ("random", "random_unfired"):
        options = (f"method.growth={growth}", "method.alpha=0.5", "method.interval=1")
        explored[growth] = rows(finish(configure(tmp_path / growth, "set_itop", *options)))[-1]
    assert explored["random_unfired"]["mask/exploration"] > explored["random"]["mask/exploration"]
    # One layer with room for all: everything that grew was new.
    layer = "layer3.2.conv1"
    assert explored["random_unfired"][f"mask/exploration/{layer}"] > explored["random"][f"mask/exploration/{layer}"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["method=rigl_itop", "method.interval=4000"],
         "method.interval=4000 with method.begin=null leaves no mask update after step 0: it would come at "
         "step 3999, updates end at step 175 of 176"),
        (["method=rigl", "method.begin=150"], "method.begin=150 leaves no mask update after step 0: it would come at "
         "step 150, updates end at step 132 of 176"),
        (["method=rigl", "method.interval=140"], "it would come at step 140, updates end at step 132 of 176"),
        (["method=set", "schedule.train.epochs=0", "schedule.train.warmup_epochs=0"], "updates end at step 0 of 0"),
        (["method=rigl", "method.interval=10", "method.grow_batches=11"], "method.grow_batches must not exceed"),
        (["method=rigl", "method.interval=null", "method.grow_batches=23"], "must not exceed method.interval=22"),
        (["method=rigl", "method.interval=10", "method.sparsity=0.99", "method.alpha=0.01", "model.width=0.25"],
         "method.alpha=0.01 moves no weight"),
    ],
)  # fmt: skip
def test_updates_that_cannot_happen_are_refused(options, words, capsys):
    assert cli.main([*options, "logger.wandb=disabled", "dry_run=true"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_kept_optimizer_state_costs_dense_gradients(tmp_path: Path):
    """Pruned weights that gather momentum for later need their gradients in every step up to the last update."""
    spent = {}
    for name in ("rigl", "set"):
        for reset in ("true", "false"):
            options = (f"method.reset_state={reset}", "method.begin=1")
            spent[name, reset] = summary(finish(configure(tmp_path / f"{name}{reset}", name, *options)))
    for name in ("rigl", "set"):
        kept, reset = spent[name, "false"], spent[name, "true"]
        extra = 8 * (kept["macs/dense"] - kept["macs/inference"])  # per step; updates at 1, 3 and 5 of 9 steps
        dense_steps = 3 if name == "rigl" else 0
        assert kept["macs/train"] - reset["macs/train"] == (6 - dense_steps) * extra


def test_a_late_single_update_is_allowed(tmp_path: Path):
    folder = finish(configure(tmp_path, "snfs", "method.interval=null", "schedule.train.epochs=2"))
    assert summary(folder)["mask/updates"] == 1
