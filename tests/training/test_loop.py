"""The training and evaluation loop: one step against torch by hand, accumulation, clipping, averages, exact scores."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prune_lab.accounting.costs import profile
from prune_lab.accounting.eligibility import select_layers
from prune_lab.core.context import Context
from prune_lab.core.method import Method, MethodConfig
from prune_lab.datasets.task import Classification
from prune_lab.foundations import checkpoint
from prune_lab.foundations.checkpoint import CheckpointPair
from prune_lab.optim.optimizer import build_optimizer
from prune_lab.training import loop
from prune_lab.training.averaging import moving_average
from prune_lab.training.device_config import DeviceConfig
from prune_lab.training.evaluation import measure
from prune_lab.training.loop import TrainState, train_step
from tests.helpers.runs import TINY, compose, execute, records, run_dir, status, summary

FP32 = DeviceConfig("cpu", "fp32", False, False)


IMAGES = SimpleNamespace(task=Classification())
"""of a data set of images"""


def small_network(*, norm: bool = False) -> nn.Module:
    torch.manual_seed(1)
    middle = [nn.BatchNorm2d(6)] if norm else []
    return nn.Sequential(nn.Conv2d(3, 6, 3), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))


def training(
    tmp_path, model: nn.Module, *overrides: str, device_config: DeviceConfig = FP32, method: Method | None = None
) -> TrainState:
    config = compose(*TINY, "schedule.train.policy=constant", *overrides)
    context = Context(
        model=model, costs=profile(model, 8), layers=select_layers(model), phase="train", seed=0, total_steps=8,
        steps_per_epoch=4, optimizer=build_optimizer(model, config.optimizer),
    )  # fmt: skip
    return TrainState(
        context=context, method=method or Method(MethodConfig("dense")),
        dataset=SimpleNamespace(num_batches=lambda batch_size: 4, info=IMAGES),
        schedule=config.schedule.phase("train"), batch_size=8, label_smoothing=config.schedule.label_smoothing,
        trainer=config.trainer, device_config=device_config, forward=model, data_seed=0,
        checkpoints=CheckpointPair(tmp_path, print), record=lambda row: None, show=lambda *_: None, stop=lambda: False,
        scaler=torch.amp.GradScaler("cpu", enabled=False), ema=moving_average(model, config.trainer.ema_decay),
    )  # fmt: skip


def batch(seed: int = 0, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 8, 8, generator=source), torch.randint(0, 4, (size,), generator=source)


def half_mask(model: nn.Module) -> dict[str, torch.Tensor]:
    return {"0.weight": torch.arange(6 * 27).view(6, 3, 3, 3) % 2 == 0}


def test_a_step_equals_the_step_by_hand(tmp_path):
    work = training(tmp_path, small_network(), "schedule.label_smoothing=0.1", "optimizer.weight_decay=0")
    reference = small_network()
    images, labels = batch()
    F.cross_entropy(reference(images), labels, label_smoothing=0.1).backward()
    train_step(work, images, labels)
    for new, old in zip(work.context.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old.detach() - 0.1 * old.grad)


def test_label_smoothing_is_in_the_reported_loss(tmp_path):
    work = training(tmp_path, small_network(), "schedule.label_smoothing=0.2")
    images, labels = batch()
    logits = small_network()(images).detach()
    smooth = torch.full((8, 4), 0.2 / 4)
    smooth[torch.arange(8), labels] += 0.8
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    train_step(work, images, labels)
    assert float(work.sums[0] / work.sums[2]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("chunks", [2, 4])
def test_accumulation_equals_the_joined_batch(tmp_path, chunks):
    whole = training(tmp_path, small_network())
    parts = training(tmp_path, small_network(), f"trainer.accumulate={chunks}")
    for seed in range(3):
        train_step(whole, *batch(seed))
        train_step(parts, *batch(seed))
    for one, other in zip(whole.context.model.parameters(), parts.context.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.sums, parts.sums, rtol=1e-6, atol=0)
    assert whole.context.cost.total == parts.context.cost.total


def test_clipping_counts_the_gradients_of_kept_weights_only(tmp_path):
    work = training(tmp_path, small_network(), "trainer.clip_norm=0.01", "optimizer.weight_decay=0")
    work.context.install_masks(half_mask(work.context.model))
    before = [parameter.detach().clone() for parameter in work.context.model.parameters()]
    train_step(work, *batch())
    moved = [old - new.detach() for old, new in zip(before, work.context.model.parameters(), strict=True)]
    norm = torch.cat([part.flatten() for part in moved]).norm()
    assert float(norm) == pytest.approx(0.1 * 0.01, rel=1e-3)  # lr times clip_norm: pruned weights did not count


def test_clipping_leaves_small_gradients_alone(tmp_path):
    plain, clipped = (training(tmp_path, small_network(), option) for option in ("seed=0", "trainer.clip_norm=1000"))
    for work in (plain, clipped):
        train_step(work, *batch())
    for one, other in zip(plain.context.model.parameters(), clipped.context.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_masks_hold_after_every_step_with_momentum_and_decay(tmp_path):
    work = training(tmp_path, small_network(), "optimizer.nesterov=true", "optimizer.weight_decay=0.1")
    mask = half_mask(work.context.model)["0.weight"]
    work.context.install_masks({"0.weight": mask})
    for seed in range(4):
        train_step(work, *batch(seed))
        weight = work.context.model[0].weight
        assert not weight[~mask].any() and weight[mask].all()
        assert weight.grad[~mask].any()  # gradients of pruned weights stay available


def test_moving_average_by_hand_with_pruned_zeros(tmp_path):
    work = training(tmp_path, small_network(norm=True), "trainer.ema_decay=0.75")
    mask = half_mask(work.context.model)["0.weight"]
    train_step(work, *batch(0))  # the first step starts the average
    expected = {name: tensor.clone() for name, tensor in work.context.model.state_dict().items()}
    work.context.install_masks({"0.weight": mask})
    for seed in (1, 2, 3):
        train_step(work, *batch(seed))
        for name, tensor in work.context.model.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = 0.75 * expected[name] + 0.25 * tensor
    expected["0.weight"] = expected["0.weight"] * mask
    averaged = work.evaluated.state_dict()
    for name in expected:
        if expected[name].is_floating_point():
            torch.testing.assert_close(averaged[name], expected[name])
    assert not averaged["0.weight"][~mask].any()


def test_moving_average_follows_zeros_that_no_mask_makes(tmp_path):
    class Shrink(Method):
        """Zeroes a row in every step, another one and a bias at the end of the epoch; opens the first one then."""

        @torch.no_grad()
        def after_step(self, context, step):
            context.parameters()["0.weight"][0] = 0

        @torch.no_grad()
        def end_epoch(self, context, epoch):
            context.parameters()["0.weight"][0] = 0.5
            context.parameters()["0.weight"][1] = -0.0
            context.parameters()["3.bias"].zero_()
            return {}

    options = ("trainer.ema_decay=0.75", "trainer.eval_interval=2")
    work = training(tmp_path, small_network(), *options, method=Shrink(MethodConfig("shrink")))
    for seed in range(3):
        train_step(work, *batch(seed))
        weight = work.evaluated.get_parameter("0.weight")
        assert not weight[0].any() and bool(weight[1:].all())
    before = weight.detach().clone()
    work.sums[2] = 1
    loop._end_epoch(work, seconds=1.0, images_per_s=1.0)
    assert bool((weight[0] == 0.5).all()) and not weight[1].any() and torch.equal(weight[2:], before[2:])
    assert not work.evaluated.get_parameter("3.bias").any()


def test_moving_average_of_a_network_that_never_trains_is_masked(tmp_path):
    options = ("method=static", "trainer.ema_decay=0.9", "schedule.train.epochs=0")
    assert execute(tmp_path, *TINY, *options) == 0
    assert summary(tmp_path)["params/nonzero"] < summary(tmp_path)["params/total"]


def test_a_step_that_a_method_leaves_out_moves_nothing_but_is_counted(tmp_path):
    class Skip(Method):
        def needs_dense_gradient(self, step):
            return True

        def after_backward(self, context, step):
            assert context.model[0].weight.grad is not None
            return False

    work = training(tmp_path, small_network(), method=Skip(MethodConfig("skip")))
    work.context.install_masks(half_mask(work.context.model))
    before = work.context.model[0].weight.detach().clone()
    forward = work.context.forward_macs
    train_step(work, *batch())
    assert torch.equal(work.context.model[0].weight, before)
    assert work.context.cost.total == 8 * (2 * forward + work.context.dense_macs)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tmp_path):
    work = training(tmp_path, small_network(), device_config=DeviceConfig("cpu", "bf16", False, False))
    seen = []
    work.context.model[3].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    exact = training(tmp_path, small_network())
    train_step(work, *batch())
    train_step(exact, *batch())
    assert seen == [torch.bfloat16]
    assert all(parameter.dtype == torch.float32 for parameter in work.context.model.parameters())
    for one, other in zip(work.context.model.parameters(), exact.context.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=5e-3)
        assert not torch.equal(one, other)


def test_channels_last_gives_the_same_step(tmp_path):
    plain = training(tmp_path, small_network())
    model = small_network().to(memory_format=torch.channels_last)
    fast = training(tmp_path, model, device_config=DeviceConfig("cpu", "fp32", True, False))
    for seed in range(2):
        images, labels = batch(seed)
        train_step(plain, images, labels)
        train_step(fast, images.to(memory_format=torch.channels_last), labels)
    for one, other in zip(plain.context.model.parameters(), fast.context.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Answers(nn.Module):
    """Gives stored logits for images that hold their own number."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[images[:, 0, 0, 0].long()]


@pytest.mark.parametrize("size", [1, 4, 7, 23, 100])
def test_evaluation_counts_every_image_once_whatever_the_batch(size):
    logits = torch.randn(23, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(23) % 9
    images = torch.arange(23.0).view(23, 1, 1, 1).expand(23, 3, 1, 1)

    class Images:
        info = IMAGES

        def eval_batches(self, split, batch_size, *, rank, world_size):
            yield from zip(images.split(batch_size), labels.split(batch_size), strict=True)

    trainer = SimpleNamespace(eval_batch_size=size, limit_eval_batches=None)
    scores = measure(Answers(logits), Images(), "test", device_config=FP32, trainer=trainer)
    ranks = (logits > logits[torch.arange(23), labels][:, None]).sum(1)
    assert scores["top1"] == 100 * int((ranks == 0).sum()) / 23
    assert scores["top5"] == 100 * int((ranks < 5).sum()) / 23
    assert scores["loss"] == pytest.approx(float(F.cross_entropy(logits.double(), labels)), rel=1e-6)


def test_evaluation_with_fewer_than_five_classes_and_mode_restored(tmp_path):
    model = small_network(norm=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    class Images:
        info = IMAGES

        def eval_batches(self, split, batch_size, *, rank, world_size):
            yield batch()

    trainer = SimpleNamespace(eval_batch_size=8, limit_eval_batches=None)
    assert measure(model, Images(), "test", device_config=FP32, trainer=trainer)["top5"] == 100.0
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_eval_interval_skips_epochs_but_never_the_last(tmp_path):
    assert execute(tmp_path, *TINY, "schedule.train.epochs=3", "trainer.eval_interval=2") == 0
    rows = [row for row in records(run_dir(tmp_path)) if row["phase"] == "train"]
    assert ["eval/top1" in row for row in rows] == [False, True, True]


def diverge_at(monkeypatch, step: int, value: float = float("nan")) -> None:
    """Let the loss of one step be no number."""
    real = F.cross_entropy
    calls = []

    def cross_entropy(logits, labels, **options):
        if "label_smoothing" in options:  # training, not evaluation
            calls.append(None)
            if len(calls) == step + 1:
                return (logits * value).sum()
        return real(logits, labels, **options)

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)


@pytest.mark.parametrize("method", ["dense", "rigl"])
def test_non_finite_loss_stops_with_place_and_last_good_checkpoint(tmp_path, monkeypatch, method, capsys):
    diverge_at(monkeypatch, 8)  # second epoch of six steps
    options = () if method == "dense" else ("method.interval=2",)
    options = (*options, "trainer.eval_interval=5", "trainer.checkpoint_interval_s=1e-9")
    assert execute(tmp_path, *TINY, f"method={method}", *options) == 1
    told = status(tmp_path)
    (good,) = tmp_path.glob("phases/*/checkpoint.pt")
    assert told["status"] == "failed" and "\n" not in told["error"]
    assert told["error"].startswith("loss is not finite in phase train, epoch 2, step 8; last good checkpoint: ")
    assert str(good) in told["error"]
    assert told["error"] in capsys.readouterr().out
    assert not (run_dir(tmp_path) / "summary.json").exists()
    saved = checkpoint.load(good)
    assert saved["progress"]["step"] == 8


def test_non_finite_loss_in_the_first_epoch_has_no_checkpoint(tmp_path, monkeypatch):
    diverge_at(monkeypatch, 2, float("inf"))
    assert execute(tmp_path, *TINY) == 1
    assert "epoch 1, step 2; last good checkpoint: none" in status(tmp_path)["error"]


def test_weights_ruined_by_the_last_step_are_never_saved_as_good(tmp_path, monkeypatch):
    """The loss of a step is finite, its gradient is not: the loss would show it one step later."""
    real, steps = loop.train_step, []

    def step(training, images, labels):
        real(training, images, labels)
        steps.append(None)
        if len(steps) == 12:
            next(training.context.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(loop, "train_step", step)
    assert execute(tmp_path, *TINY) == 1
    assert "weights are not finite in phase train, epoch 2, step 11" in status(tmp_path)["error"]
    assert [row["epoch"] for row in records(run_dir(tmp_path))] == [1]


def test_after_a_failure_the_same_command_goes_on(tmp_path, monkeypatch):
    diverge_at(monkeypatch, 8)
    assert execute(tmp_path, *TINY) == 1
    monkeypatch.undo()
    assert execute(tmp_path, *TINY) == 0
    assert [row["epoch"] for row in records(run_dir(tmp_path)) if row["phase"] == "train"] == [1, 2]
