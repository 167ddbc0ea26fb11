"""Targets: what is typed replaces the default, and what was reached is set against what was asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_lab.accounting import targets
from prune_lab.cli import command as cli
from prune_lab.commands.compare.command import main
from prune_lab.config.run import as_mapping
from prune_lab.core.method import build_method
from prune_lab.foundations.errors import UserError
from tests.helpers.method_runs import NAMES, configure, finish, make, run_folder, summary
from tests.helpers.runs import compose


@pytest.mark.parametrize(
    ("name", "typed", "left"),
    [
        ("constrained_l0", ["method.macs_ratio=0.5"], {"macs": 0.5}),
        ("constrained_l0", ["method.sparsity=0.9"], {"sparsity": 0.9}),
        ("constrained_l0", ["method.macs_ratio=null"], {"sparsity": 0.9}),
        ("constrained_l0", ["method.macs_ratio=0.5", "method.sparsity=0.9"], {"sparsity": 0.9, "macs": 0.5}),
        ("constrained_l0", ["method.granularity=filter"], {"gated_sparsity": 0.9}),
        ("l1_filter", [], {"macs": 0.5}),
        ("l1_filter", ["method.params_ratio=0.4"], {"params": 0.4}),
        ("l1_filter", ["method.channels_ratio=0.6", "method.scope=global"], {"channels": 0.6}),
        ("l1_filter", ["method.layer_channels=[layer1.*:0.5]"], {}),
        ("masksparsity", ["method.threshold=0.01"], {}),
        ("greedy", ["method.top1_tol=0.02"], {}),
        ("dep_l0", ["method.channels_ratio=0.6"], {"channels": 0.6}),
        ("gdp", ["method.params_ratio=0.3"], {"params": 0.3}),
        ("small_dense", ["method.sparsity=0.6"], {"params": pytest.approx(0.4)}),
        ("rigl", ["method.sparsity=0.8"], {"sparsity": 0.8}),
        ("l0", [], {}),
    ],
)
def test_a_typed_target_replaces_the_default_one(name: str, typed: list[str], left: dict[str, float]) -> None:
    config = compose(f"method={name}", *typed)
    assert build_method(config).asked() == left
    for goal in config.method.GOALS:
        assert as_mapping(config)["method"][goal] == getattr(config.method, goal)


def test_targets_of_a_recipe_count_as_chosen() -> None:
    recipe = compose("experiment=constrained_l0/wrn_28_10_cifar10_model_50")
    assert list(build_method(recipe).asked()) == ["gated_sparsity"]
    with pytest.raises(UserError, match=r"exactly one of method.macs_ratio.* got method.macs_ratio=0.5 and"):
        compose("method=l1_filter", "method.macs_ratio=0.5", "method.params_ratio=0.5")


def test_several_targets_are_told() -> None:
    assert targets.plan_line({"sparsity": 0.9}) is targets.plan_line({}) is None
    assert targets.plan_line({"sparsity": 0.9, "macs": 0.5}) == "targets: sparsity 0.9 and MACs ratio 0.5, all of them"


@pytest.mark.parametrize(
    ("asked", "found", "unit", "reached", "met"),
    [
        ({"macs": 0.5}, {"macs/inference_ratio": 0.055}, "macs", 0.055, False),
        ({"macs": 0.5}, {"macs/inference_ratio": 0.494}, "macs", 0.494, True),
        ({"sparsity": 0.9}, {"sparsity/achieved": 0.976}, "sparsity", 0.976, False),
        ({"gated_sparsity": 0.5}, {"l0/density": 0.52}, "gated_sparsity", 0.48, False),
        ({"params": 0.4}, {"params/kept": 403, "params/dense": 1000}, "params", 0.403, True),
        ({"channels": 0.6}, {"prune/channels_kept": 0.6, "remove/channels_kept": 0.5}, "channels", 0.5, False),
        # The cost that binds is met, the other one is below its limit.
        ({"sparsity": 0.9, "macs": 0.5}, {"sparsity/achieved": 0.9, "macs/inference_ratio": 0.2}, "sparsity", 0.9,
         True),
        ({"sparsity": 0.5, "macs": 0.3}, {"sparsity/achieved": 0.7, "macs/inference_ratio": 0.4}, "macs", 0.4, False),
    ],
)
def test_what_was_reached_is_set_against_what_was_asked(
    asked: dict[str, float], found: dict[str, float], unit: str, reached: float, met: bool
) -> None:
    figures = targets.figures(asked, found)
    assert figures == {"target/unit": unit, "target/asked": asked[unit], "target/reached": pytest.approx(reached),
                       "target/met": met}  # fmt: skip
    assert targets.figures(asked, {}) == targets.figures({}, found) == {}
    line = targets.line(figures)
    assert line is None if met and unit == "sparsity" else line.startswith("MISSED by more than 0.01: ") is not met


@pytest.mark.parametrize("name", NAMES)
def test_every_method_asks_in_a_known_unit(name: str) -> None:
    method = make(name)
    assert set(method.asked()) <= set(targets.UNITS)
    assert set(method.config.GOALS) <= {field for field in vars(method.config)}


def test_a_missed_target_is_in_the_summary_on_the_console_and_in_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("method.gate_lr=1e-6", "method.dual_lr=1e-6", "method.rounding=gates")
    config = configure(tmp_path, "constrained_l0", *options, short={"macs_ratio": 0.5, "bn_images": 0})
    written = summary(finish(config))
    assert written["target/unit"] == "macs" and written["target/asked"] == 0.5 and written["target/met"] is False
    assert written["target/reached"] == written["macs/inference_ratio"] > 0.9
    said = f"MISSED by more than 0.01: MACs ratio 0.5 asked, {written['target/reached']:.4g} reached"
    assert said in (run_folder(config) / "log.txt").read_text()
    capsys.readouterr()
    assert main([str(tmp_path), "--format", "csv"]) == 0 and main([str(tmp_path), "--format", "markdown"]) == 0
    out = capsys.readouterr().out
    assert f"macs 0.5: {written['target/reached']:.4g}" in out and "target missed: what was asked" in out


def test_the_dry_run_tells_two_targets(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["method=constrained_l0", "method.sparsity=0.5", "method.macs_ratio=0.5", "model.width=0.25"]
    assert cli.main([*options, "dry_run=true", f"output_dir={tmp_path}"]) == 0
    assert "targets: sparsity 0.5 and MACs ratio 0.5, all of them" in capsys.readouterr().out
