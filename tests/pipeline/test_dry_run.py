"""dry_run=true: the plan and its exact costs without data, for every data set, method and model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from prune_lab import datasets
from prune_lab.cli import command as cli
from prune_lab.compose.choices import choices, conf_dir
from prune_lab.compose.overrides import compose_checked
from prune_lab.foundations.errors import UserError
from prune_lab.models.configs import RECURRENT_NAMES
from prune_lab.pipeline import dry_run

LARGE = ("wrn_16_8", "wrn_28_10", "resnet110", "vgg19", "resnet34", "resnet50")


def run(folder: Path, *overrides: str) -> dict:
    """Do one dry run in this process; return dry_run.json, the only file it may leave."""
    (config,) = compose_checked(conf_dir(), [*overrides, f"output_dir={folder}", "dry_run=true"], sweep=False)
    assert dry_run.dry_run(config) == 0
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path.name for path in files] == ["dry_run.json"]
    return json.loads(files[0].read_text())


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("distribution", "ratio", "first_layer"), [("erk", 0.2418, None), ("uniform", 0.1260, "conv1")]
)
def test_resnet50_on_imagenet_costs_what_the_rigl_note_states(
    tmp_path: Path, distribution: str, ratio: float, first_layer: str | None
) -> None:
    """methods/rigl.md 8.4: multipliers of ResNet-50 at 90 %; uniform leaves the first layer dense."""
    found = run(tmp_path, "method=rigl", "model=resnet50", "dataset=imagenet", f"method.distribution={distribution}")
    assert round(found["macs/inference_ratio"], 4) == ratio
    assert found["macs/dense"] == 4_089_184_256
    assert found["params/dense"] == 25_557_032
    assert [row["name"] for row in found["layers"] if not row["eligible"]] == ([first_layer] if first_layer else [])


def test_the_layer_table_adds_up_to_the_totals(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = run(tmp_path, "method=rigl", "method.sparsity=0.8")
    layers = found["layers"]
    assert sum(row["macs_kept"] for row in layers) == found["macs/inference"]
    assert sum(row["macs_dense"] for row in layers) == found["macs/dense"]
    size, kept = sum(row["weights"] for row in layers), sum(row["kept"] for row in layers)
    assert kept == round(0.2 * size)
    assert found["params/total"] - found["params/nonzero"] == size - kept
    printed = capsys.readouterr().out
    assert printed.isascii() and "plan: train (8 epochs)" in printed and "nothing was trained" in printed
    assert all(row["name"] in printed for row in layers)


def test_training_macs_are_three_forwards_and_the_dense_gradients(tmp_path: Path) -> None:
    """rigl.md: an update costs 2 f_S + f_D, any other step 3 f_S; updates at 0, 10, 20 of 24 steps below end."""
    options = ("dataset=fake", "dataset.num_train=64", "schedule.batch_size=8", "schedule.train.epochs=3")
    found = run(tmp_path / "rigl", *options, "method=rigl", "method.interval=10", "method.end=0.9")
    sparse, dense = found["macs/inference"], found["macs/dense"]
    assert found["macs/train"] == 8 * (3 * sparse * 24 + 3 * (dense - sparse))
    assert found["macs/train_dense"] == 8 * 3 * dense * 24
    assert run(tmp_path / "dense", *options)["macs/train_ratio"] == 1.0


def test_every_flat_key_known_without_training_is_there(tmp_path: Path) -> None:
    found = run(tmp_path, "method=static", "model.width=0.25")
    assert set(found) >= {
        "run/seed", "run/command", "run/device", "run/versions", "config/model", "config/dataset", "config/method",
        "config/schedule", "sparsity/requested", "sparsity/achieved", "params/dense", "params/total", "params/nonzero",
        "macs/dense", "macs/inference", "macs/inference_ratio", "macs/train", "macs/train_dense", "macs/train_ratio",
        "phases", "layers",
    }  # fmt: skip
    assert set(found["layers"][0]) >= {
        "name", "kind", "shape", "eligible", "reason", "kept", "density", "macs_dense", "macs_kept",
    }  # fmt: skip


def test_a_global_cut_states_totals_and_leaves_layers_open(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = run(tmp_path, "method=magnitude", "method.distribution=global", "model.width=0.25")
    assert found["sparsity/achieved"] == pytest.approx(0.9, abs=1e-4)
    assert found["macs/inference"] is None
    assert [phase["name"] for phase in found["phases"]] == ["train", "prune", "finetune"]
    printed = capsys.readouterr().out
    assert "? depends on the trained weights" in printed and "own run" not in printed


def test_a_global_cut_before_training_depends_on_scores(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(tmp_path, "method=snip", "model.width=0.25")
    assert "? depends on the scores\n" in capsys.readouterr().out


def test_the_command_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["dry_run=true", "model.width=0.25", "method=static", "method.exclude=[conv1, linear]"]
    assert cli.main(typed) == 0
    (path,) = tmp_path.rglob("dry_run.json")
    command = json.loads(path.read_text())["run/command"]
    assert shlex.split(command) == ["prune-lab", *typed]


NEED_DATA = ("imagefolder", "text")


@pytest.mark.parametrize("name", [name for name in choices(conf_dir(), "dataset") if name not in NEED_DATA])
def test_no_data_set_is_needed_on_disk(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load", lambda *arguments: pytest.fail("the dry run read data"))
    small = ["dataset.image_size=32"] if "imagenet" in name else []
    found = run(tmp_path / "out", f"dataset={name}", *small, "model.width=0.25")
    assert found["config/dataset"] == name


def test_an_image_folder_needs_its_sizes_or_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="num_classes|dataset.root"):
        run(tmp_path / "a", "dataset=imagefolder")
    assert not (tmp_path / "a").exists()
    sizes = ("dataset.num_classes=7", "dataset.expect_train=700", "dataset.expect_test=70", "dataset.image_size=32")
    assert run(tmp_path / "b", "dataset=imagefolder", *sizes, "model.width=0.25")["layers"][-1]["shape"][0] == 7


def small(name: str) -> list[str]:
    return ["model.name=squeezenet1_1", "dataset.image_size=64"] if name == "torchvision" else ["dataset.image_size=16"]


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE))
             for name in choices(conf_dir(), "model") if name not in RECURRENT_NAMES]
)
def test_every_model_on_small_images(name: str, tmp_path: Path) -> None:
    size = ["dataset.image_size=32"] if name.startswith(("vgg", "mobilenet")) else small(name)
    found = run(tmp_path, "dataset=fake", "method=static", f"model={name}", *size)
    assert found["params/dense"] > found["params/nonzero"]
    assert found["sparsity/achieved"] == pytest.approx(0.9, abs=1e-4)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        run(tmp_path)


def test_an_infeasible_target_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reachable maximum"):
        run(tmp_path, "method=rigl", "method.sparsity=0.99999", "model.width=0.25")
    assert not list(tmp_path.iterdir())
