"""Runs that share a process: what each of them ends with is what it ends with alone, but for rounding."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prune_lab.cli import command as cli
from prune_lab.datasets.task import Classification
from prune_lab.training.device_config import DeviceConfig
from prune_lab.training.loop import differentiate
from prune_lab.training.phases import build_model
from tests.helpers.runs import METHODS, TINY, compose, execute, records, run_dir

pytest.importorskip("greenlet", reason="needs prune-lab[launchers]")
joint_networks = pytest.importorskip("prune_lab.launch.joint_networks")

CALM = ("schedule.train.lr=0.001", "schedule.finetune.lr=0.001")
"""rates at which rounding errors do not grow within a few steps"""
LAUNCHER = "hydra/launcher=vectorised"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trainings(model_name: str, num: int, *, precision: str = "fp32") -> list[SimpleNamespace]:
    """Return what a batch's gradient needs of `num` runs with different weights; in float64, to compare closely."""
    config = compose(*TINY, f"model={model_name}", "model.width=0.25").model
    models = [build_model(config, num_classes=4, image_size=16, seed=seed) for seed in range(num)]
    return trainings_of([model.double().train() for model in models], precision)


def trainings_of(models: Sequence[nn.Module], precision: str = "fp32") -> list[SimpleNamespace]:
    return [
        SimpleNamespace(
            context=SimpleNamespace(model=model), forward=model, label_smoothing=0.1 * seed,
            trainer=SimpleNamespace(accumulate=2), device_config=DeviceConfig("cpu", precision, False, False),
            scaler=torch.amp.GradScaler("cpu", enabled=False), task=Classification(), carried={}, part=0,
        )
        for seed, model in enumerate(models)
    ]  # fmt: skip


def batches(runs: Sequence[SimpleNamespace]) -> list[joint_networks.Batch]:
    source = torch.Generator().manual_seed(0)
    return [joint_networks.Batch(run, torch.randn(6, 3, 16, 16, generator=source).double(),
                                 torch.randint(4, (6,), generator=source)) for run in runs]  # fmt: skip


@pytest.mark.parametrize("model", ["resnet20", "vgg16", "wrn_16_8"])
def test_joint_gradients_losses_and_statistics_are_those_of_each_network_alone(model: str) -> None:
    check_joint(trainings(model, 3))


def test_modules_under_two_names_and_tied_weights_are_computed_together() -> None:
    models = [nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), *[nn.BatchNorm2d(4)] * 2, nn.Conv2d(4, 4, 1, bias=False),
                            nn.Conv2d(4, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
              for _ in range(3)]  # fmt: skip
    for model in models:
        model[4].weight = model[3].weight
    check_joint(trainings_of([model.double().train() for model in models]))
    assert all(model[1] is model[2] and model[4].weight is model[3].weight for model in models)


def check_joint(together: list[SimpleNamespace]) -> None:
    alone = copy.deepcopy(together)
    for one in alone:
        one.forward = one.context.model
    expected = [differentiate(batch.training, batch.images, batch.labels) for batch in batches(alone)]
    networks = joint_networks.JointNetworks(together)
    answers = networks.differentiate(batches(together))
    for (loss, logits), (own_loss, own_logits) in zip(answers, expected, strict=True):
        torch.testing.assert_close(loss, own_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits, own_logits, rtol=1e-6, atol=1e-6)
    for run, own in zip(together, alone, strict=True):
        compare_networks(run.context.model, own.context.model, factor=1)
    networks.differentiate(batches(together))  # the second micro-batch of the step: gradients add up
    for run, own in zip(together, alone, strict=True):
        compare_gradients(run.context.model, own.context.model, factor=2)


def compare_networks(model: nn.Module, own: nn.Module, *, factor: float) -> None:
    compare_gradients(model, own, factor=factor)
    for (name, buffer), own_buffer in zip(model.named_buffers(), own.buffers(), strict=True):
        torch.testing.assert_close(buffer, own_buffer, rtol=1e-12, atol=1e-12, msg=name)


def compare_gradients(model: nn.Module, own: nn.Module, *, factor: float) -> None:
    """Assert that gradients are `factor` times the other network's: to a millionth of the largest of all layers."""
    largest = max(float(parameter.grad.abs().max()) for parameter in own.parameters())
    for (name, parameter), other in zip(model.named_parameters(), own.parameters(), strict=True):
        assert parameter.grad.stride() == parameter.stride()
        difference = float((parameter.grad - factor * other.grad).abs().max())
        assert difference <= 1e-6 * largest, (name, difference, largest)


def test_what_cannot_be_computed_together_is_told() -> None:
    plain, dropping, hooked = trainings("resnet20", 3)
    (rounded,) = trainings("resnet20", 1, precision="bf16")
    assert "bf16 does not reach stacked convolutions" in joint_networks.reason_not_joint(rounded)
    dropping.context.model.add_module("drop", nn.Dropout(0.1))
    hooked.context.model.register_forward_hook(lambda *_: None)
    assert joint_networks.reason_not_joint(plain) is None
    assert "dropout" in joint_networks.reason_not_joint(dropping)
    assert "forward pass" in joint_networks.reason_not_joint(hooked)


def test_only_networks_of_one_kind_are_computed_together() -> None:
    first, second, strided = trainings("resnet20", 3)
    assert joint_networks.kind(first) == joint_networks.kind(second)
    strided.context.model.conv1.stride = (2, 2)  # has parameters of the same shapes
    others = [*trainings("vgg16", 1), *trainings("resnet20", 1, precision="bf16"), strided]
    assert len({joint_networks.kind(training) for training in (first, *others)}) == 4


def test_stacked_networks_go_when_they_are_given_up() -> None:
    networks = weakref.ref(joint_networks.JointNetworks(trainings("resnet20", 2)))
    assert networks() is None, "only a full garbage collection would free the memory"


SLOW = ("dense", "gmp", "directional", "slimming", "autosparse", "l0", "snip", "fpgm")
TOGETHER = ("magnitude", "rigl", "str", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW))


@pytest.mark.thin(4)
@pytest.mark.parametrize("method", TOGETHER)
def test_runs_end_as_they_end_alone_but_for_rounding(method: str, tmp_path: Path, monkeypatch) -> None:
    options = (*TINY, *CALM, *METHODS[method])
    seen = []
    original = joint_networks.JointNetworks.differentiate
    monkeypatch.setattr(joint_networks.JointNetworks, "differentiate",
                        lambda self, given: (seen.append(len(given)), original(self, given))[1])  # fmt: skip
    assert cli.main(["-m", *options, "seed=0,1,2", LAUNCHER, "output_dir=together"]) == 0
    assert execute(tmp_path / "alone", *options, "seed=1") == 0
    one, alone = next(Path("together").glob("*-s1-*")), run_dir(tmp_path / "alone")
    if joined(method):
        assert seen and set(seen) == {3}, "three networks at a time"
    mine, own = load_file(one / "model.safetensors"), load_file(alone / "model.safetensors")
    for name, tensor in own.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, at=name: f"{at}: {text}")
        assert torch.equal(mine[name] == 0, tensor == 0), f"{name} is pruned elsewhere"
    for row, own_row in zip(records(one), records(alone), strict=True):
        assert row.keys() == own_row.keys() and row["phase"] == own_row["phase"]
        for key in {"train/loss", "eval/loss", "sparsity", "macs/train", "global_step"} & row.keys():
            assert row[key] == pytest.approx(own_row[key], rel=1e-3), key
    assert one.name != alone.name, "rounding differs, so the runs have names of their own"


def compare_with_alone(tmp_path: Path, *options: str) -> str:
    """Run seeds 0 and 1 together and seed 1 alone, assert that the weights are the same bits, and return the log."""
    assert cli.main(["-m", *options, "seed=0,1", LAUNCHER, "output_dir=together"]) == 0
    assert execute(tmp_path / "alone", *options, "seed=1") == 0
    one = next(Path("together").glob("*-s1-*"))
    mine, own = (load_file(path / "model.safetensors") for path in (one, run_dir(tmp_path / "alone")))
    assert all(torch.equal(mine[name], own[name]) for name in own)
    return (one / "log.txt").read_text()


@pytest.mark.parametrize("more", [("trainer.accumulate=2",), METHODS["rigl"]])
def test_networks_with_dropout_draw_what_they_draw_alone(more: tuple[str, ...], tmp_path: Path) -> None:
    log = compare_with_alone(tmp_path, *TINY, "model=wrn_16_8", "model.width=0.125", "model.dropout=0.3", *more)
    assert log.count("computed alone: its dropout would draw other numbers") == 1


def test_what_cannot_be_stacked_is_computed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_):
        raise RuntimeError("vmap: no rule")

    monkeypatch.setattr(joint_networks.JointNetworks, "differentiate", refuse)
    log = compare_with_alone(tmp_path, *TINY, *METHODS["rigl"])
    assert log.count("computed alone: together it failed with RuntimeError: vmap: no rule") == 1


def test_a_second_ctrl_c_ends_every_run_as_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(joint_networks.JointNetworks, "differentiate", interrupted)
    assert cli.main(["-m", *TINY, "method=dense", "seed=0,1,2", LAUNCHER, "hydra.launcher.at_once=2"]) == 130
    statuses = [json.loads(path.read_text())["status"] for path in Path("outputs").glob("*/status.json")]
    assert statuses == ["interrupted", "interrupted"], "the third has not begun"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_stacked_networks_compute_in_bf16_on_a_gpu() -> None:
    """Their gradients are as far from fp32 as those of networks alone: nearer would mean that they are fp32."""
    def flat(run) -> torch.Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in run.context.model.parameters()])

    distances = []
    for together in (False, True):
        exact, rounded = trainings("resnet20", 2), trainings("resnet20", 2)
        for run in (*exact, *rounded):
            run.context.model.float().cuda()
            run.device_config = DeviceConfig("cuda", "bf16" if run in rounded else "fp32", False, False)
        for runs in (exact, rounded):
            given = [joint_networks.Batch(b.training, b.images.float().cuda(), b.labels.cuda()) for b in batches(runs)]
            if together:
                joint_networks.JointNetworks(runs).differentiate(given)
            else:
                for batch in given:
                    differentiate(batch.training, batch.images, batch.labels)
        distances.append(float((flat(rounded[0]) - flat(exact[0])).norm() / flat(exact[0]).norm()))
    assert 0.5 < distances[1] / distances[0] < 2


def joined(method: str) -> bool:
    """Whether the method leaves the forward pass as it is, so that its networks can be computed together."""
    return method not in ("str", "autosparse")


def test_networks_of_different_size_and_failing_runs_do_not_disturb_each_other(capsys) -> None:
    assert cli.main(["-m", *TINY, "model.width=0.25,0.5", "method=static", "method.sparsity=0.9,0.99999", LAUNCHER,
                     "hydra.launcher.at_once=3"]) == 1  # fmt: skip
    captured = capsys.readouterr()
    assert captured.out.endswith("sweep: 2 of 4 runs finished\n")
    assert captured.err.count("method.sparsity is out of reach") == 2
    logs = sorted(Path("outputs/sweep").glob("*/run-*.log"))
    assert [log.read_text().splitlines()[-1] for log in logs][0::2] == ["finished", "finished"]
    assert "train 2/2" in logs[0].read_text()


def test_a_dense_phase_that_several_runs_need_is_trained_once(capsys) -> None:
    command = ["-m", *TINY, "method=magnitude", "method.sparsity=0.5,0.8,0.9", LAUNCHER]
    assert cli.main(command) == 0
    assert "phases with training: 4 done, 6 without sharing" in capsys.readouterr().out
    assert len(list(Path("outputs/phases").iterdir())) == 1 + 3 * 2
    assert cli.main(command) == 0
    assert "phases with training: 0 done" in capsys.readouterr().out


def test_a_signal_stops_all_and_the_same_command_ends_as_if_there_had_been_none(capsys) -> None:
    """Bit by bit, because the same networks are computed together again."""
    options = (*TINY, *METHODS["rigl"], "schedule.train.epochs=10", "seed=0,1")
    command = ["-m", *options, LAUNCHER, "output_dir=stopped"]
    threading.Thread(target=stop_when_training, args=(Path("stopped"),), daemon=True).start()
    assert cli.main(command) == 128 + signal.SIGTERM
    statuses = {json.loads(path.read_text())["status"] for path in Path("stopped").glob("*/status.json")}
    assert statuses == {"interrupted"}
    assert cli.main(command) == 0
    assert "resumed at step" in next(Path("stopped").glob("*-s1-*/log.txt")).read_text()
    assert cli.main(["-m", *options, LAUNCHER, "output_dir=whole"]) == 0
    for name in (path.name for path in Path("whole").glob("*-s*")):
        one, other = (load_file(Path(folder) / name / "model.safetensors") for folder in ("stopped", "whole"))
        assert all(torch.equal(one[key], other[key]) for key in other), name


def stop_when_training(folder: Path) -> None:
    while not any(path.stat().st_size for path in folder.glob("phases/*/metrics.jsonl")):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("option", "environment", "message"),
    [
        ("hydra.launcher.at_once=0", {}, "hydra.launcher.at_once must be a whole number of at least 1, got 0"),
        ("hydra.launcher.at_once=true", {}, "hydra.launcher.at_once must be a whole number of at least 1, got True"),
        ("trainer.threads=1,2", {}, "trainer.threads must be the same for all runs"),
        ("hydra.launcher.atonce=2", {}, "Could not override 'hydra.launcher.atonce'"),
        ("hydra.launcher.at_once=2", {"WORLD_SIZE": "2"}, "start it without torchrun"),
    ],
)
def test_wrong_options_are_refused(option: str, environment, message: str, capsys, monkeypatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["-m", *TINY, "seed=0,1", LAUNCHER, option]) == 1
    assert message in capsys.readouterr().err
    assert not Path("outputs").exists()
