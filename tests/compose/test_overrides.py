"""Overrides checked before Hydra: what a sweep expands to, and choices read from the folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_lab.cli.command import split_flags
from prune_lab.compose.choices import choices, conf_dir, groups
from prune_lab.compose.overrides import compose_checked
from prune_lab.foundations.errors import UserError


def compose(*overrides: str, sweep: bool = True) -> list:
    return list(compose_checked(conf_dir(), list(overrides), sweep=sweep))


def test_groups_and_choices_are_the_folders_and_files() -> None:
    assert groups(conf_dir()) == sorted({path.name for path in conf_dir().iterdir() if path.is_dir()} - {"hydra"})
    assert {"model", "dataset", "method", "schedule", "optimizer", "trainer", "logger", "experiment", "debug"} <= set(
        groups(conf_dir())
    )
    optimizers = ["adam", "adamw", "frank_wolfe", "frank_wolfe_sgd", "sgd", "sgd_imagenet", "sgd_plain"]
    assert choices(conf_dir(), "optimizer") == optimizers


def test_a_sweep_is_every_combination_in_order() -> None:
    configs = compose("method=static,rigl", "seed=0,1")
    assert [(config.method.name, config.seed) for config in configs] == [
        ("static", 0), ("static", 1), ("rigl", 0), ("rigl", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "seeds"),
    [("seed=range(3)", [0, 1, 2]), ("seed=range(1,6,2)", [1, 3, 5]), ("seed=choice(4,2)", [4, 2]), ("seed=5", [5])],
)
def test_ranges_and_choices(override: str, seeds: list[int]) -> None:
    assert [config.seed for config in compose(override)] == seeds


def test_a_glob_takes_every_file_of_a_group() -> None:
    found = [config.schedule.name for config in compose("schedule=glob(cifar_*)")]
    assert found == ["cifar_160", "cifar_250", "cifar_short"]


def test_the_last_of_two_values_counts_as_in_hydra() -> None:
    (config,) = compose("seed=1", "seed=2", sweep=False)
    assert config.seed == 2


def test_quoted_texts_may_hold_anything(tmp_path: Path) -> None:
    (config,) = compose(f'output_dir="{tmp_path}/a=b, (c)"', sweep=False)
    assert config.output_dir == f"{tmp_path}/a=b, (c)"


def test_flags_and_overrides_are_told_apart() -> None:
    assert split_flags(["-m", "seed=0,1"]) == (["-m"], ["seed=0,1"])
    assert split_flags(["seed=1", "--cfg", "job", "--resolve"]) == (["--cfg", "--resolve"], ["seed=1"])
    assert split_flags(["--cfg=job", "-p", "method", "~x"]) == (["--cfg", "-p"], ["~x"])
    with pytest.raises(UserError, match="^-p needs a name$"):
        split_flags(["--cfg", "job", "-p"])
