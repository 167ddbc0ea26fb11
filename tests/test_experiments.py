"""Every recipe in conf/experiment and conf/debug composes, passes a dry run and trains a little."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_lab.cli import conf_dir, main
from prune_lab.overrides import choices

SHORT = ("schedule.train.epochs=2", "schedule.finetune.epochs=1", "schedule.train.warmup_epochs=0",
         "trainer.limit_train_batches=12", "trainer.limit_eval_batches=1", "schedule.batch_size=4",
         "logger.wandb=disabled")  # fmt: skip
FAKE = ("dataset=fake", "dataset.image_size=16", "model.width=0.25")


@pytest.mark.parametrize("name", choices(conf_dir(), "experiment"))
def test_every_experiment_passes_a_dry_run(name: str, tmp_path: Path) -> None:
    assert main([f"experiment={name}", "dry_run=true", f"output_dir={tmp_path}"]) == 0
    assert len(list(tmp_path.glob("*/dry_run.json"))) == 1


@pytest.mark.parametrize("name", choices(conf_dir(), "experiment"))
def test_every_experiment_trains_on_fake_data(name: str, tmp_path: Path) -> None:
    assert main([f"experiment={name}", *FAKE, *SHORT, f"output_dir={tmp_path}"]) == 0
    assert len(list(tmp_path.glob("*/summary.json"))) == 1


@pytest.mark.parametrize("schedule", choices(conf_dir(), "schedule"))
def test_debug_tiny_shortens_every_schedule(schedule: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--cfg", "job", "debug=tiny", f"schedule={schedule}"]) == 0
    assert "limit_train_batches: 4" in capsys.readouterr().out


def test_debug_tiny_runs(tmp_path: Path) -> None:
    options = ("method=magnitude", "debug=tiny", *FAKE, "logger.wandb=disabled")
    assert main([*options, f"output_dir={tmp_path}"]) == 0
    assert len(list(tmp_path.glob("*/summary.json"))) == 1
