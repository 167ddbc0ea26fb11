"""The options of a run: YAML files and dataclasses agree, every rule across options is tested by its rejection."""

from __future__ import annotations

import os
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from prune_lab import datasets, models
from prune_lab.compose import check as configuration
from prune_lab.compose.choices import choices, conf_dir, options_of, own_options
from prune_lab.compose.overrides import compose_checked
from prune_lab.config import logger, run, trainer
from prune_lab.config import schedule as config_schedule
from prune_lab.core.method import build_method
from prune_lab.foundations.errors import UserError

FILES = sorted(
    path for path in conf_dir().glob("*/*.yaml") if path.parent.name not in ("experiment", "debug", "method")
)


ALGORITHMS = {"sgd_imagenet": "sgd", "sgd_plain": "sgd", "frank_wolfe_sgd": "frank_wolfe"}
"""file of an optimizer -> its algorithm, where they differ"""

INHERITING = [*FILES, *sorted(conf_dir().glob("method/*.yaml"))]


def compose(*overrides: str) -> run.RunConfig:
    (config,) = compose_checked(conf_dir(), list(overrides), sweep=False)
    return config


def read(path: Path) -> dict:
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        compose(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parsed(group: str, node: dict) -> Any:
    if group == "model":
        return models.parse_config(node | {"name": node["name"] or "resnext50_32x4d"})
    if group == "dataset":
        return datasets.parse_config(node)
    if group == "optimizer":
        return configuration._optimizer(node)
    classes = {
        "schedule": config_schedule.ScheduleConfig,
        "trainer": trainer.TrainerConfig,
        "logger": logger.LoggerConfig,
    }
    return configuration.parse(classes[group], node, group)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_keys_of_every_file_are_the_fields_of_its_class(path: Path) -> None:
    node = options_of(path)
    config = parsed(path.parent.name, node)
    assert set(node) == {field.name for field in fields(config)}
    assert all(field.default is MISSING and field.default_factory is MISSING for field in fields(config))
    for key in ("train", "finetune") if path.parent.name == "schedule" else ():
        assert set(node[key]) == {field.name for field in fields(config_schedule.PhaseSchedule)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_names_are_those_of_the_files(path: Path) -> None:
    node = read(path)
    if path.parent.name in ("schedule", "optimizer", "dataset") or (path.parent.name == "model" and node["name"]):
        assert node["name"] == ALGORITHMS.get(path.stem, path.stem)


def test_the_default_run_is_dense_resnet20_on_digits() -> None:
    config = compose()
    assert (config.model.name, config.dataset.name, config.schedule.name) == ("resnet20", "digits", "demo")
    assert config.method_target.endswith(".Dense") and build_method(config).requested_sparsity() is None
    assert (config.seed, config.output_dir, config.dry_run) == (0, "outputs", False)


@pytest.mark.parametrize(
    ("dataset", "schedule"),
    [("digits", "demo"), ("fake", "demo"), ("cifar10", "cifar_short"), ("imagenet", "imagenet_90")],
)
def test_a_data_set_brings_its_schedule_and_a_chosen_one_wins(dataset: str, schedule: str) -> None:
    assert compose(f"dataset={dataset}").schedule.name == schedule
    assert compose(f"dataset={dataset}", "schedule=cifar_250").schedule.name == "cifar_250"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.train.policy=step", "schedule.train.milestones=[5,3]"], "schedule.train.milestones must rise"),
        (["schedule.train.policy=step", "schedule.train.milestones=[8]"], "milestones must lie before epoch 8"),
        (["schedule.train.warmup_epochs=8"], "schedule.train.warmup_epochs must be below schedule.train.epochs=8"),
        (["schedule.train.final_lr=0.2"], "schedule.train.final_lr must not exceed schedule.train.lr=0.1"),
        (["schedule.train.policy=cosin"], "did you mean 'cosine'?"),
        (["schedule.train.lr=0"], "schedule.train.lr must lie in (0, inf), got 0"),
        (["schedule.train.lr=nan"], "schedule.train.lr must be a finite number, got nan"),
        (["schedule.finetune.gamma=-1"], "schedule.finetune.gamma must lie in (0, inf)"),
        (["schedule.batch_size=0"], "schedule.batch_size must lie in [1, inf)"),
        (["schedule.multiplier=0"], "schedule.multiplier must lie in (0, inf)"),
        (["schedule.multiplier=inf"], "schedule.multiplier must be a finite number"),
        (["schedule.label_smoothing=1"], "schedule.label_smoothing must lie in [0, 1)"),
        (["schedule.name=a/b"], "the name of schedule=demo is no option; choose another schedule with schedule=NAME"),
        (["model=resnet50", "model.name=resnet18"], "model.name=resnet18: the name of model=resnet50 is no option; "
         "choose another model with model=resnet18"),
        (["method=rigl", "method.name=foo"], "method.name=foo: the name of method=rigl is no option"),
        (["dataset.name=other"], "dataset.name=other: the name of dataset=digits is no option"),
        (["++dataset.name=other"], "dataset.name=other: the name of dataset=digits is no option"),
        (["optimizer=adam", "optimizer.name=adamw"], "choose another optimizer with optimizer=adamw"),
        (["optimizer.momentum=0", "optimizer.nesterov=true"], "optimizer.nesterov=true needs optimizer.momentum > 0"),
        (["optimizer.name=lion"], "optimizer.name=lion: the name of optimizer=sgd is no option"),
        (["optimizer=adam", "optimizer.beta1=1"], "optimizer.beta1 must lie in [0, 1)"),
        (["optimizer=adam", "optimizer.eps=0"], "optimizer.eps must lie in (0, inf)"),
        (["optimizer=frank_wolfe", "optimizer.inner_steps=0"], "optimizer.inner_steps must lie in [1, inf)"),
        (["optimizer=frank_wolfe", "optimizer.inner_radius=0"], "optimizer.inner_radius must lie in (0, inf)"),
        (["optimizer=frank_wolfe", "optimizer.inner_point=here"], "allowed: official, ball"),
        (["optimizer=frank_wolfe", "optimizer.outer.beta1=1"], "optimizer.outer.beta1 must lie in [0, 1)"),
        (["optimizer=frank_wolfe", "optimizer.outer.name=lion"], "optimizer.outer.name=lion is not allowed"),
        (["optimizer=frank_wolfe", "optimizer.momentum=0.5"], "optimizer.momentum"),
        (["optimizer.weight_decay=-1"], "optimizer.weight_decay must lie in [0, inf)"),
        (["optimizer=adam", "optimizer.momentum=0.9"], "optimizer=adam has none, only optimizer=sgd"),
        (["trainer.device=tpu"], "trainer.device=tpu is not allowed"),
        (["trainer.device=cuda:x"], "trainer.device=cuda:x is not allowed"),
        (["trainer.device=cpu:0"], "trainer.device=cpu:0 is not allowed"),
        (["trainer.precision=fp8"], "trainer.precision=fp8 is not allowed"),
        (["trainer.channels_last=yes"], "trainer.channels_last=yes is not allowed; allowed: true, false, auto"),
        (["trainer.compile=1"], "trainer.compile=1 is not allowed; allowed: true, false, auto, graphs"),
        (["trainer.accumulate=0"], "trainer.accumulate must lie in [1, inf)"),
        (["trainer.clip_norm=0"], "trainer.clip_norm must lie in (0, inf)"),
        (["trainer.ema_decay=1"], "trainer.ema_decay must lie in (0, 1)"),
        (["trainer.limit_train_batches=0"], "trainer.limit_train_batches must lie in [1, inf)"),
        (["trainer.threads=0"], "trainer.threads must lie in [1, inf)"),
        (["logger.wandb=no"], "logger.wandb=no is not allowed; allowed: auto, online, offline, disabled"),
        (["logger.tags=a"], "logger.tags must be a list"),
        (["seed=-1"], "seed must lie in [0, inf), got -1"),
        (["seed=1.5"], "seed must be a whole number, got 1.5"),
        (["seed=true"], "seed must be a whole number, got true"),
        (["dry_run=1"], "dry_run must be true or false, got 1"),
        (["output_dir="], "output_dir must name a folder, got an empty text"),
        (["output_dir=1"], "output_dir must be a text, got 1"),
        (["method._target_=os.system"], "method._target_=os.system is not a prune_lab.core.method.Method"),
        (["method._target_=nowhere.Rule"], "method._target_=nowhere.Rule cannot be imported"),
        (["method._target_=prune_lab.methods.rigl.Rigl"], "cannot be imported"),
        (["method._target_=Rule"], "method._target_ must name a class"),
        (["method._target_=.a.Rule"], "cannot be imported"),
        (["model.width=0"], "model.width must lie in (0, inf)"),
        (["model=torchvision"], "model.name is missing"),
        (["dataset=fake", "dataset.validation=1"], "dataset.validation"),
    ],
)
def test_wrong_options_are_refused(overrides: list[str], message: str) -> None:
    assert message in refusal(*overrides)


def test_output_dir_must_be_a_folder_or_become_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file, no folder" in refusal(f"output_dir={tmp_path}/file")
    assert "is a file, no folder" in refusal(f"output_dir={tmp_path}/file/deeper")
    assert compose(f"output_dir={tmp_path}/new/deeper").output_dir == f"{tmp_path}/new/deeper"
    assert not (tmp_path / "new").exists()


def test_a_folder_without_write_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write everywhere
    assert "no permission to write" in refusal(f"output_dir={tmp_path}/new")


def test_multiplier_stretches_epochs_milestones_and_warm_up() -> None:
    schedule = compose("schedule=imagenet_100", "schedule.multiplier=0.5").schedule
    assert (schedule.phase("train").epochs, schedule.phase("finetune").epochs) == (50, 15)
    assert schedule.phase("train").milestones == [15, 35, 45]
    assert schedule.phase("train").warmup_epochs == 2.5


def test_a_stretched_phase_keeps_an_epoch_and_a_skipped_one_stays_skipped() -> None:
    schedule = compose("schedule.multiplier=0.01", "schedule.finetune.epochs=0").schedule
    assert (schedule.phase("train").epochs, schedule.phase("finetune").epochs) == (1, 0)


@pytest.mark.parametrize(
    ("name", "epochs", "batch_size", "lr"),
    [("demo", 8, 64, 0.1), ("cifar_short", 10, 128, 0.1), ("cifar_160", 160, 128, 0.1), ("cifar_250", 250, 128, 0.1),
     ("imagenet_90", 90, 256, 0.1), ("imagenet_100", 100, 4096, 1.6)],
)  # fmt: skip
def test_schedules_state_the_published_lengths(name: str, epochs: int, batch_size: int, lr: float) -> None:
    schedule = compose(f"schedule={name}").schedule
    assert (schedule.train.epochs, schedule.batch_size, schedule.train.lr) == (epochs, batch_size, lr)


def test_rigls_cifar_milestones_are_30000_steps_apart() -> None:
    milestones = compose("schedule=cifar_250").schedule.train.milestones
    assert [round(milestone * 50_000 / 128) for milestone in milestones] == [30_000, 60_000, 90_000]


def test_the_options_as_a_mapping_are_the_ones_composed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    composed = []

    def check(node: dict) -> run.RunConfig:
        composed.append(dict(node))
        return configuration.check(node)

    monkeypatch.setattr("prune_lab.compose.overrides.check", check)
    for overrides in (["method=rigl"], ["method=lottery", "optimizer=adam"], ["experiment=demo_rigl", "seed=3"]):
        config = compose(*overrides, f"output_dir={tmp_path}/out")
        expected = composed.pop() | {"output_dir": "~/out"}
        assert run.as_mapping(config) == expected
        assert configuration.check(run.as_mapping(config)) == replace(config, overrides=())


@pytest.mark.parametrize("path", INHERITING, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_repeats_nothing_that_it_inherits(path: Path) -> None:
    own = own_options(path)
    parents = [name for name in own.pop("defaults", ()) if isinstance(name, str) and name != "_self_"]
    if any("@" in name for name in parents):  # inherits a group of its own
        return
    inherited = {key: value for name in parents for key, value in options_of(path.with_name(f"{name}.yaml")).items()}
    assert [key for key, value in own.items() if key in inherited and inherited[key] == value] == []
    assert options_of(path) == inherited | own


def test_what_methods_inherit_is_no_choice() -> None:
    shared = {path.stem for path in conf_dir().glob("method/_*.yaml")}
    assert len(shared) >= 5 and not shared & set(choices(conf_dir(), "method"))
    assert refusal("method=_weight_pruning").startswith("method=_weight_pruning is not a choice")
