"""L0 gates on weights and channels: gradients by autograd, decay, the batch norm of closed channels, runs, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab import models
from prune_lab.cli import command as cli
from prune_lab.config.schedule import PhaseSchedule
from prune_lab.core.context import Context
from prune_lab.families.gated_weights import GatedWeights, gate_rate
from prune_lab.foundations import checkpoint, seeding
from prune_lab.pipeline import runner
from prune_lab.pipeline.saved_model import load_model
from prune_lab.pruning.batch_norm.statistics import measure_statistics
from prune_lab.pruning.channels.groups import channel_groups, weight_masks
from prune_lab.pruning.gates import hard_concrete as hc
from prune_lab.pruning.gates.hard_concrete import BETA, GAMMA, ZETA
from prune_lab.training.loop import TrainState
from tests.helpers.contexts import context_of
from tests.helpers.method_runs import configure, finish, last_result, make, summary, watch

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(7))
LABELS = torch.arange(16) % 5
SGD = {"lr": 0.1, "weight_decay": 0.0}


class Excite(nn.Module):
    """Squeeze-and-excitation of 6 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.expand = nn.Conv2d(6, 3, 1, bias=False), nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(torch.relu(self.squeeze(x.mean([2, 3], keepdim=True)))))


def network(*, seed: int = 0, depthwise: bool = False, excite: bool = False) -> nn.Module:
    """Return two convolutions and a linear layer; the hidden channels of both convolutions can be gated."""
    torch.manual_seed(seed)
    middle = [nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU()] if depthwise else []
    middle += [Excite()] if excite else []
    layers = [
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), *middle,
        nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.MaxPool2d(4), nn.Flatten(), nn.Linear(16, 5),
    ]  # fmt: skip
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # otherwise an empty channel would show 0 after the ReLU
            nn.init.uniform_(module.bias, 0.2, 1.0)
    return model.train()


def set_up(
    model: nn.Module, name: str = "l0", *, optimizer: type = torch.optim.SGD, group: dict = SGD, **options: Any
) -> tuple[GatedWeights, Context]:
    context = context_of(model, {}, image_size=8)
    context.optimizer = optimizer(model.parameters(), **group)
    context.schedule = PhaseSchedule(10, 0.1, "constant", [], 0.1, 0.0, 0.0)
    context.dataset = SimpleNamespace(info=SimpleNamespace(image_size=8, num_train=1000))
    context.last_step = context.total_steps
    method = make(name, **({"penalty": 1.0} if name == "l0" else {}) | options)
    method.setup(context)
    return method, context


def spread_gates(method: GatedWeights, low: float = -3.0, high: float = 4.0) -> None:
    """Give the gates values over a range, so that draws are 0, 1 and between."""
    source = torch.Generator().manual_seed(11)
    values = torch.rand(method.log_alpha.shape, generator=source) * (high - low) + low
    method.log_alpha.data.copy_(values)


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(IMAGES), LABELS)


def do_step(method: GatedWeights, context: Context, step: int = 0, *, after: bool = True) -> float:
    """Do what the loop does in a step; return the loss."""
    context.optimizer.zero_grad()
    method.before_forward(context, step)
    loss = loss_of(context.model)
    loss.backward()
    method.after_backward(context, step)
    if after:
        context.optimizer.step()
        method.after_step(context, step)
    return loss.item()


def expected_gates(context: Context, log_alpha: Tensor, step: int) -> Tensor:
    """Return the gates of a step, differentiable."""
    source = seeding.generator(context.seed, context.phase, "gates", step)
    logistic = hc.noise(len(log_alpha), source)
    return (torch.sigmoid((logistic + log_alpha) / BETA) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


# Gradients


@pytest.mark.parametrize("decay_moves_gates", [False, True])
def test_gradients_are_those_of_the_written_loss(decay_moves_gates: bool) -> None:
    """CE(w z) + lambda / N sum P + 0.5 wd sum P |w|^2, a gate per weight."""
    group = {"lr": 0.1, "weight_decay": 0.3}
    model = network()
    method, context = set_up(model, group=group, penalty=40.0, decay_moves_gates=decay_moves_gates)
    spread_gates(method)
    raw = {path: weight.clone().requires_grad_() for path, weight in method.raw.items()}
    a = method.log_alpha.detach().clone().requires_grad_()
    split = expected_gates(context, a, 5).split([weight.numel() for weight in raw.values()])
    effective = {path: weight * z.view_as(weight) for (path, weight), z in zip(raw.items(), split, strict=True)}
    logits = torch.func.functional_call(network(), effective, IMAGES)
    opened = hc.open_probability(a)
    held = opened if decay_moves_gates else opened.detach()
    squares = torch.cat([weight.flatten().square() for weight in raw.values()])
    loss = F.cross_entropy(logits, LABELS) + 40 / 1000 * opened.sum() + 0.15 * (held * squares).sum()
    loss.backward()
    do_step(method, context, 5, after=False)
    torch.testing.assert_close(method.log_alpha.grad, a.grad, rtol=1e-4, atol=1e-6)
    for path, weight in raw.items():  # the optimizer adds wd w itself
        found = context.parameters()[path].grad + 0.3 * weight.detach()
        torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(context.parameters()[path].data, method.raw[path])
    zeros = sum(int((z == 0).sum()) for z in split)
    assert 0 < zeros < len(a) / 2


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_weight_decay_counts_open_weights_under_each_optimizer(kind: str) -> None:
    options = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    group = {"lr": 0.05, "weight_decay": 0.4}
    method, context = set_up(network(), optimizer=options[kind], group=group, penalty=0.0, decay_moves_gates=False)
    spread_gates(method)
    before = {path: weight.clone() for path, weight in method.raw.items()}
    opened = dict(zip(method.raw, method.layout_of.parts(hc.open_probability(method.log_alpha.detach())), strict=True))
    plain, bare = set_up(network(), optimizer=options[kind], group=group | {"weight_decay": 0.0}, penalty=0.0)
    plain.log_alpha.data.copy_(method.log_alpha.data)
    do_step(plain, bare, after=False)
    gradients = {path: bare.parameters()[path].grad.clone() for path in before}
    do_step(method, context)
    for path, weight in before.items():
        mine = weight.clone().requires_grad_()
        mine.grad = gradients[path] + (0.4 * opened[path] * weight if kind != "adamw" else 0)
        with torch.no_grad():
            if kind == "adamw":
                mine.mul_(1 - 0.05 * 0.4 * opened[path])
        options["adam" if kind == "adamw" else kind]([mine], lr=0.05).step()
        torch.testing.assert_close(method.raw[path], mine.detach(), rtol=1e-4, atol=1e-5)


def test_the_price_of_a_gate_is_that_of_its_weights() -> None:
    for granularity, sizes in (("weight", None), ("filter", [27] * 6 + [54] * 4)):
        method, context = set_up(network(), granularity=granularity, penalty=10.0)
        price = method.price(context, hc.open_probability(method.log_alpha.detach()))
        expected = torch.ones(27 * 6 + 54 * 4 + 80) if sizes is None else torch.tensor(sizes).float()
        torch.testing.assert_close(price, expected * 10 / 1000)


# Gates in a network


def test_the_start_follows_the_drop_rate() -> None:
    method, _ = set_up(network(), drop_rate=0.3)
    assert method.log_alpha.mean().item() == pytest.approx(0.8473, abs=2e-3)
    assert method.log_alpha.std().item() == pytest.approx(0.01, rel=0.1)
    torch.testing.assert_close(method.raw["0.weight"], network()[0].weight.data / 0.7)
    method, _ = set_up(network(), drop_rate=0.3, rescale=False)
    assert torch.equal(method.raw["0.weight"], network()[0].weight.data)


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_with_all_gates_open_the_network_is_the_dense_one(granularity: str) -> None:
    method, context = set_up(network(), granularity=granularity, rescale=False, penalty=0.0)
    method.log_alpha.data.fill_(40.0)
    dense = network()
    assert do_step(method, context, after=False) == pytest.approx(loss_of(dense).item())
    loss_of(dense).backward()
    for mine, other in zip(context.model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_evaluation_draws_nothing() -> None:
    method, context = set_up(network())
    spread_gates(method)
    do_step(method, context)
    gates = method.layout_of.parts(hc.fixed_gate(method.log_alpha.detach(), "louizos"))
    for (path, raw), gate in zip(method.raw.items(), gates, strict=True):
        assert torch.equal(context.parameters()[path].data, raw * gate)
        assert torch.equal(context.masks.masks[path], gate > 0)
    model = context.model.eval()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), model(IMAGES))


def test_draws_belong_to_the_step() -> None:
    method, context = set_up(network())
    drawn = []
    for step in (3, 4, 3):
        method.before_forward(context, step)
        drawn.append(method.drawn)
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


def test_clamped_gates_stay_within_their_limits() -> None:
    for clamp in (True, False):
        method, context = set_up(network(), gate_optimizer="adam", gate_lr=50.0, penalty=1e6, clamp_gates=clamp)
        do_step(method, context)
        lowest = method.log_alpha.min().item()
        assert lowest == pytest.approx(-hc.LIMIT) if clamp else lowest < -40


def test_a_step_that_fp16_skips_moves_neither_weights_nor_gates() -> None:
    method, context = set_up(network(), "constrained_l0", dual_lr=1.0)
    context.amp_scaled = True
    do_step(method, context)
    before = {"a": method.log_alpha.data.clone(), "lambda": method.multipliers.clone(), **method.raw}
    before = {name: value.clone() for name, value in before.items()}
    held = context.model[0].weight.data.clone()
    context.optimizer.zero_grad()
    method.before_forward(context, 1)
    loss_of(context.model).backward()
    context.model[1].bias.grad[0] = torch.inf
    method.after_backward(context, 1)
    method.after_step(context, 1)  # the scaler has left out the optimizer's step
    after = {"a": method.log_alpha.data, "lambda": method.multipliers, **method.raw}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(context.model[0].weight.data, held)
    do_step(method, context, 2)
    assert not torch.equal(method.log_alpha.data, before["a"])


# Channels


class L0BatchNorm(nn.BatchNorm2d):
    """Batch norm of the channels whose gate is open; the others pass as zeros and keep their statistics.

    Written after the official code of Gallego-Posada et al. 2022.
    """

    gate: Tensor

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate > 0
        out = torch.zeros_like(x)
        if not bool(chosen.any()):
            return out
        mean, var = self.running_mean[chosen], self.running_var[chosen]
        normed = F.batch_norm(x[:, chosen], mean, var, self.weight[chosen], self.bias[chosen], self.training)
        self.running_mean[chosen], self.running_var[chosen] = mean, var
        return out.index_copy(1, chosen.nonzero().flatten(), normed)


def literal(model: nn.Module, groups: list, gates: list[Tensor]) -> nn.Module:
    """Return `model` with batch norms that know the gates; the weights are multiplied by the caller."""
    for group, gate in zip(groups, gates, strict=True):
        for path in group.norms:
            norm = model.get_submodule(path)
            norm.__class__, norm.gate = L0BatchNorm, gate.detach().flatten()
    return model


@pytest.mark.parametrize("case", ["some", "none", "depthwise", "excite"])
def test_closed_channels_are_those_of_l0_batch_norm(case: str) -> None:
    """Outputs, all gradients and running statistics; in the case "none" a whole layer is closed.

    In the case "excite" the factors of a squeeze-and-excitation follow the channels, and its inner channels have gates.
    """
    middle = {"depthwise": case in ("depthwise", "excite"), "excite": case == "excite"}
    method, context = set_up(network(**middle), granularity="filter", penalty=0.0, decay_moves_gates=False)
    spread_gates(method)
    if case == "none":
        method.log_alpha.data[:6] = -50.0
    groups = channel_groups(context.model, 8)
    a = method.log_alpha.detach().clone().requires_grad_()
    gates = expected_gates(context, a, 2).split([group.size for group in groups])
    assert len(groups) == 2 + (case == "excite")
    reference = literal(network(**middle), groups, list(gates))
    raw = {f"{g.producer}.weight": method.raw[f"{g.producer}.weight"].clone().requires_grad_() for g in groups}
    weights = dict(reference.named_parameters())
    effective = {
        path: weight * gate.view(-1, 1, 1, 1) for (path, weight), gate in zip(raw.items(), gates, strict=True)
    }
    loss = F.cross_entropy(torch.func.functional_call(reference, effective, IMAGES), LABELS)
    loss.backward()
    assert do_step(method, context, 2, after=False) == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(method.log_alpha.grad, a.grad, rtol=1e-4, atol=1e-6)
    assert a.grad.any() or case == "none"  # nothing depends on the images there
    for path, parameter in context.parameters().items():
        expected = raw[path].grad if path in raw else weights[path].grad
        expected = torch.zeros_like(parameter) if expected is None else expected
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    for name, buffer in context.model.named_buffers():
        if "running" in name:
            torch.testing.assert_close(buffer, dict(reference.named_buffers())[name])
    assert (method.drawn == 0).any() and (case == "none" or (method.drawn > 0).any())


def test_masks_are_what_removing_the_channels_leaves() -> None:
    method, context = set_up(network(depthwise=True), granularity="filter")
    spread_gates(method, low=-6.0)
    do_step(method, context)
    groups = channel_groups(context.model, 8)
    parts = method.layout_of.parts(hc.fixed_gate(method.log_alpha.detach(), "louizos"))
    kept = {group.producer: part.flatten() > 0 for group, part in zip(groups, parts, strict=True)}
    expected = weight_masks(context.model, groups, kept)
    assert context.masks.masks.keys() == expected.keys()
    assert all(torch.equal(context.masks.masks[path], mask) for path, mask in expected.items())
    assert 0 < context.masks.density < 1


def test_the_constant_of_a_closed_channel_reaches_nobody() -> None:
    method, context = set_up(network(), granularity="filter")
    spread_gates(method, low=-6.0)
    do_step(method, context)
    model = context.model.eval()
    with torch.no_grad():
        before = model(IMAGES)
        closed = ~context.masks.masks["0.weight"].flatten(1).any(1)
        assert 0 < int(closed.sum()) < 6
        model[1].bias[closed] = 100.0
        torch.testing.assert_close(model(IMAGES), before)
        model[1].bias[~closed] = 100.0
        assert not torch.allclose(model(IMAGES), before)


def test_weights_behind_closed_channels_live_on() -> None:
    """What reads a channel is trained again as it was when the channel opens."""
    method, context = set_up(network(), granularity="filter", gate_lr=1e-6)
    before = method.raw["3.weight"].clone()
    method.log_alpha.data[0] = -50.0
    do_step(method, context)
    assert not context.model[3].weight[:, 0].any()
    assert torch.equal(method.raw["3.weight"][:, 0], before[:, 0]) and before[:, 0].all()


# Runs

FILTER = ("method.granularity=filter", "method.penalty=20")


def trained(folder: Path) -> dict[str, Any]:
    """Return what the training left, before channels were removed."""
    return checkpoint.load(folder / "phases" / "0-train" / "result.pt")


def rows(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["phase"] == "train"]


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_records_say_what_the_gates_leave(granularity: str, tmp_path: Path) -> None:
    folder = finish(configure(tmp_path, "l0", f"method.granularity={granularity}", "method.penalty=1e-4"))
    result, last, written = trained(folder), rows(folder)[-1], summary(folder)
    gates = hc.fixed_gate(result["method"]["log_alpha"], "louizos")
    assert last["l0/open_gates"] == pytest.approx((gates > 0).double().mean().item())
    assert 0 < last["l0/open_gates"] < 1 and written["l0/density"] == last["l0/density"]
    assert written["macs/train"] == written["macs/train_dense"]
    assert written["macs/inference"] < written["macs/dense"]
    assert written["sparsity/requested"] is None
    assert last["macs/inference"] == written["macs/inference"]
    small, named = last_result(folder)["model"], dict(load_model(folder).named_parameters())
    assert all(torch.equal(small[path], tensor) for path, tensor in named.items())
    if granularity == "weight":
        assert 0 < last["sparsity"] == written["sparsity/achieved"] == pytest.approx(1 - last["l0/density"])
        assert all(not named[path][~mask].any() for path, mask in result["masks"].items())
        assert written["params/total"] == written["params/dense"]
    else:
        assert written["params/kept"] == written["params/total"] < written["params/dense"]
        assert written["params/nonzero"] is written["sparsity/achieved"] is None and "sparsity" not in last
        assert last["channels/kept"] == written["remove/channels_kept"] > last["l0/open_gates"]
        assert last_result(folder)["masks"] is None and result["masks"]
        check_gates_between(result, named)


def check_gates_between(result: dict[str, Any], small: dict[str, Tensor]) -> None:
    """Gates that are neither 0 nor 1 stay in the weights of the smaller network."""
    groups, state, between = channel_groups(load_dense(), 16), result["method"], 0
    for group, a in zip(groups, state["log_alpha"].split([group.size for group in groups]), strict=True):
        path, gates = f"{group.producer}.weight", hc.fixed_gate(a, "louizos")
        if gates.any():
            expected = state["raw"][path][gates > 0] * gates[gates > 0].view(-1, 1, 1, 1)
            columns_kept = result["masks"][path][gates > 0][0].flatten(1).any(1)
            assert torch.equal(small[path], expected[:, columns_kept])
            between += int(((gates > 0) & (gates < 1)).sum())
    assert between > 0


def load_dense() -> nn.Module:
    return models.build(configure(Path("unused"), "dense").model, num_classes=10, image_size=16)


def test_a_layer_without_channels_keeps_its_best(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = finish(configure(tmp_path, "l0", "method.granularity=filter", "method.penalty=1e9"))
    result, shown = trained(folder), capsys.readouterr().out
    assert "layers without any open gate: layer1.0.conv1, " in shown
    assert "(each keeps its best channel all the same)" in shown
    sizes = [group.size for group in channel_groups(load_dense(), 16)]
    small = load_model(folder)
    for group, a in zip(channel_groups(load_dense(), 16), result["method"]["log_alpha"].split(sizes), strict=True):
        left = result["masks"][f"{group.producer}.weight"].flatten(1).any(1)
        assert left.nonzero().flatten().tolist() == [int(a.argmax())]
        weight = small.get_submodule(group.producer).weight
        assert weight.shape[0] == 1 and weight.any()
    written = summary(folder)
    assert written["remove/channels_kept"] < 1 and math.isfinite(written["final/loss"])


def test_channels_resume_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*FILTER, "method.gate_optimizer=sgd", "method.gate_lr=30")
    straight = last_result(finish(configure(tmp_path / "straight", "l0", *options)))

    def look(training: TrainState, step: int) -> None:
        if step == 4:
            monkeypatch.setattr(training, "stop", lambda: True)

    watch(monkeypatch, look)
    assert runner.run(configure(tmp_path / "parts", "l0", *options)) != 0
    again = last_result(finish(configure(tmp_path / "parts", "l0", *options)))
    assert straight["widths"] == again["widths"]
    assert all(torch.equal(tensor, again["model"][name]) for name, tensor in straight["model"].items())
    assert straight["method"] == again["method"]


@pytest.mark.parametrize("family", [("vgg16", "0.0625"), ("mobilenet_v2", "0.25")])
def test_channels_of_other_families(family: tuple[str, str], tmp_path: Path) -> None:
    name, width = family
    options = (f"model={name}", f"model.width={width}", "dataset.image_size=32", "schedule.train.epochs=1",
               "schedule.train.warmup_epochs=0", "schedule.batch_size=4", "trainer.limit_train_batches=3")  # fmt: skip
    written = summary(finish(configure(tmp_path, "l0", *FILTER, "method.gate_lr=2", *options)))
    assert written["macs/inference"] < written["macs/dense"]


def test_processes_draw_the_same_whatever_was_drawn_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    watch(monkeypatch, lambda training, step: seen.append(training.method.drawn.clone()))
    for index in range(2):
        torch.manual_seed(index)
        finish(configure(tmp_path / str(index), "l0", "schedule.train.epochs=1", "schedule.train.warmup_epochs=0"))
    assert all(torch.equal(one, other) for one, other in zip(seen[:3], seen[3:], strict=True))


def test_the_rate_of_the_gates_follows_the_length_of_the_training() -> None:
    assert [gate_rate("adam", steps) for steps in (10, 200, 2000, 10**6)] == [0.1, 0.1, 0.01, 0.001]
    assert gate_rate("sgd", 2000) == 6
    method, _ = set_up(network(), gate_optimizer="sgd", gate_lr=None)
    assert method.optimizer.param_groups[0]["lr"] == 6 and method.optimizer.param_groups[0]["momentum"] == 0.9


# What it says and refuses


def test_gates_slower_than_weights_are_warned_of() -> None:
    lines: list[str] = []
    for rate in (0.05, 0.1, 6.0):
        context = context_of(network(), {}, image_size=8)
        context.report, context.schedule = lines.append, PhaseSchedule(10, 0.1, "constant", [], 0.1, 0.0, 0.0)
        context.dataset = SimpleNamespace(info=SimpleNamespace(image_size=8))
        make("l0", gate_optimizer="sgd", gate_lr=rate).setup(context)
    assert [line.split()[0] for line in lines] == ["method.gate_lr=0.05", "method.gate_lr=0.1"]


def test_nothing_pruned_and_empty_layers_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    finish(configure(tmp_path / "none", "l0", "method.penalty=0", "method.gate_lr=1e-6"))
    assert "nothing was pruned: no gate is closed" in capsys.readouterr().out
    finish(configure(tmp_path / "all", "l0", "method.penalty=1e9"))
    assert "layers without any open gate: conv1, layer1.0.conv1, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method.drop_rate=0"], "method.drop_rate must lie in (0, 1)"),
        (["method.drop_rate=1"], "method.drop_rate must lie in (0, 1)"),
        (["method.penalty=-0.1"], "method.penalty must lie in [0, inf)"),
        (["method.gate_lr=0"], "method.gate_lr must lie in (0, inf)"),
        (["method.granularity=kernel"], "method.granularity=kernel is not allowed"),
        (["method.granularity=filter", "method.include=[conv1]"], "method.include=conv1 goes with method.granularity"),
        (["method.bn_images=1"], "method.bn_images=1: one image has no variance; allowed: 0 (off), or 2 and more"),
        (["method.exclude=[nothing]"], "method.exclude: 'nothing' matches no layer"),
        (["method.granularity=filter", "method.exclude=[layer*.conv1]"], "has no hidden channels of their own"),
        (["method.sparsity=0.5"], "the sparsity is an outcome of method.penalty"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert cli.main(["method=l0", "dataset=fake", f"output_dir={tmp_path}/outputs", *options]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.glob("outputs/*"))


# Batch norm of the finished network


def test_batch_norm_is_measured_on_the_finished_network(tmp_path: Path) -> None:
    options = ("method.bn_images=16", "method.granularity=filter", "method.penalty=1e-4")
    folder = finish(configure(tmp_path, "l0", *options))
    model, written = load_model(folder), summary(folder)
    plain = finish(configure(tmp_path / "plain", "l0", *options[1:], "method.bn_images=0"))
    other = load_model(plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not torch.equal(model.bn1.running_mean, other.bn1.running_mean)
    passes = [row["macs/inference"] * 16 for row in rows(folder)]  # after each epoch, with the masks in force
    assert written["macs/train"] == written["macs/train_dense"] + sum(passes)


def test_measured_statistics_are_means_over_batches() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert measure_statistics(model, IMAGES.split(8)) == 16
    parts = [model[0](part).detach().transpose(0, 1).flatten(1) for part in IMAGES.split(8)]
    torch.testing.assert_close(model[1].running_mean, torch.stack([part.mean(1) for part in parts]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([part.var(1) for part in parts]).mean(0))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{index}.running_{what}" for index in (1, 4) for what in ("mean", "var")}
    assert model.training and model[1].training and model[1].momentum == 0.1
    assert measure_statistics(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), IMAGES.split(8)) == 0


def test_a_run_with_measured_batch_norm_resumes_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("method.bn_images=16",)
    straight = last_result(finish(configure(tmp_path / "straight", "l0", *options)))

    def look(training: TrainState, step: int) -> None:
        if step in (3, 7):
            monkeypatch.setattr(training, "stop", lambda: True)

    watch(monkeypatch, look)
    while runner.run(configure(tmp_path / "parts", "l0", *options)) != 0:
        pass
    again = last_result(finish(configure(tmp_path / "parts", "l0", *options)))
    assert all(torch.equal(tensor, again["model"][name]) for name, tensor in straight["model"].items())


def test_a_moving_average_is_refused_with_measured_batch_norm(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["method=l0", "trainer.ema_decay=0.99"]) == 1
    assert "trainer.ema_decay=0.99 needs method.bn_images=0" in capsys.readouterr().err
