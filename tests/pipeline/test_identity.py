"""Keys of phases and runs: what changes a result changes the key, nothing else does."""

from __future__ import annotations

import json

import pytest
import torch

from prune_lab import models
from prune_lab.pipeline import identity
from prune_lab.training.device_config import resolve_device_config
from tests.helpers.runs import METHODS, TINY, compose

BASE = (*TINY, "method=rigl")


def keys(*overrides: str, fingerprint: str | None = "data", world_size: int = 1) -> tuple[str, ...]:
    """Return the keys of the phases and of the run."""
    config = compose(*overrides)
    planned = identity.plan_phases(
        config, model=config.model, fingerprint=fingerprint, world_size=world_size,
        device_config=resolve_device_config(config.trainer).identity(),
    )  # fmt: skip
    return *(entry.key for entry in planned), identity.run_key(planned, config)


@pytest.fixture(scope="module")
def base() -> tuple[str, ...]:
    return keys(*BASE)


@pytest.mark.parametrize("option", [
    "seed=1", "model=resnet32", "model.width=0.5", "dataset.num_train=56", "dataset.image_size=32",
    "dataset.content_seed=1", "dataset.validation=0.25", "dataset.validation_seed=1", "dataset.augment=false",
    "dataset.crop_padding=2", "dataset.flip=false", "dataset.mean=[0.4,0.5,0.5]", "dataset.std=[0.3,0.3,0.3]",
    "schedule.batch_size=16", "schedule.multiplier=2", "schedule.label_smoothing=0.1", "schedule.train.epochs=3",
    "schedule.train.lr=0.2", "schedule.train.policy=linear", "schedule.train.gamma=0.2",
    "schedule.train.warmup_epochs=1", "schedule.train.final_lr=0.01", "optimizer=adamw", "optimizer.momentum=0.8",
    "optimizer.nesterov=true", "optimizer.weight_decay=0", "optimizer.decay_norm_and_bias=false",
    "trainer.precision=bf16", "trainer.channels_last=true", "trainer.accumulate=2", "trainer.clip_norm=1",
    "trainer.ema_decay=0.9", "trainer.eval_interval=2", "trainer.limit_train_batches=2", "trainer.limit_eval_batches=1",
    "method=set", "method=dense", "method.sparsity=0.8", "method.distribution=uniform", "method.alpha=0.2",
    "method.interval=50", "method.exclude=[fc]",
])  # fmt: skip
def test_an_option_that_can_change_a_result_changes_every_key(base, option):
    assert set(keys(*BASE, option)).isdisjoint(base)


@pytest.mark.parametrize("option", [
    "logger.wandb=offline", "logger.project=other", "logger.tags=[a]", "output_dir=elsewhere",
    "trainer.eval_batch_size=7", "trainer.checkpoint_interval_s=1", "dry_run=true",
    "schedule.finetune.epochs=7",
])  # fmt: skip
def test_an_option_that_cannot_change_the_result_changes_no_key(base, option):
    assert keys(*BASE, option) == base


def test_threads_split_sums_and_count_on_a_cpu(base):
    before = torch.get_num_threads()
    try:
        assert set(keys(*BASE, f"trainer.threads={before + 1}")).isdisjoint(base)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("option", ["dataset.root=elsewhere", "dataset.cache_dir=elsewhere", "dataset.download=true"])
def test_where_the_data_lies_changes_no_key(option):
    assert keys("dataset=cifar10", option) == keys("dataset=cifar10")


def test_content_of_the_data_and_number_of_processes_count(base):
    assert set(keys(*BASE, fingerprint="other")).isdisjoint(base)
    assert set(keys(*BASE, world_size=2)).isdisjoint(base)


def test_a_limited_evaluation_counts_in_images():
    limited = (*BASE, "trainer.limit_eval_batches=2")
    assert keys(*limited, "trainer.eval_batch_size=7") != keys(*limited)
    assert keys(*BASE, "trainer.limit_eval_batches=4", "trainer.eval_batch_size=5") == keys(
        *BASE, "trainer.limit_eval_batches=2", "trainer.eval_batch_size=10"
    )


@pytest.mark.thin(4)
@pytest.mark.parametrize("method", METHODS)
def test_keys_are_stable_and_end_with_the_method(method):
    assert keys(*TINY, *METHODS[method]) == keys(*TINY, *METHODS[method])


def test_the_dense_phase_is_shared_by_methods_and_sparsities_only():
    chains = [keys(*TINY, *options) for options in
              (("method=dense",), ("method=magnitude",), ("method=magnitude", "method.sparsity=0.5"))]  # fmt: skip
    assert len({chain[0] for chain in chains}) == 1
    assert len({chain[1] for chain in chains[1:]}) == 2
    assert len({chain[-1] for chain in chains}) == 3
    assert keys(*TINY, "method=magnitude", "schedule.finetune.lr=0.5")[:2] == chains[1][:2]


def test_start_weights_count_by_content_not_by_path(tmp_path):
    for name, content in (("a.pt", b"one"), ("b.pt", b"one"), ("c.pt", b"two")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (keys(*TINY, f"model.weights={tmp_path / name}") for name in ("a.pt", "b.pt", "c.pt"))
    assert a == b and set(a).isdisjoint(c)
    assert models.weights_digest(compose(*TINY).model) is None


def test_a_file_of_densities_counts_by_content_not_by_path(tmp_path):
    for name, value in (("a.json", 0.1), ("b.json", 0.1), ("c.json", 0.2)):
        (tmp_path / name).write_text(json.dumps({"conv1": value}))
    options = (*TINY, "method=static", "method.distribution=file")
    a, b, c = (keys(*options, f"method.densities={tmp_path / name}") for name in ("a.json", "b.json", "c.json"))
    assert a == b and set(a).isdisjoint(c)


def group(*overrides: str) -> str:
    config = compose(*overrides)
    device_config = resolve_device_config(config.trainer).identity()
    return identity.group_key(config, model=config.model, fingerprint="data", device_config=device_config, world_size=1)


def test_group_is_shared_by_runs_that_can_differ_by_the_seed_only():
    same = ("seed=5", "output_dir=x", "logger.project=y", "trainer.checkpoint_interval_s=7")
    assert group(*BASE, *same) == group(*BASE)
    assert group(*BASE, "method.sparsity=0.8") != group(*BASE)
    assert group(*BASE, "trainer.precision=bf16") != group(*BASE)
