"""AutoSparse: the worked examples of its forward and backward pass, its schedule, its runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from prune_lab.cli import command as cli
from prune_lab.config.schedule import PhaseSchedule
from prune_lab.core.context import Context
from prune_lab.families.annealed_gradient import alpha_at, decline
from prune_lab.families.soft_threshold import shrink, threshold_gradient
from prune_lab.foundations.errors import UserError
from prune_lab.training.loop import TrainState
from tests.helpers.contexts import context_of
from tests.helpers.method_runs import configure, finish, last_result, make, run_folder, summary, watch

W = torch.tensor([[0.8, -0.6, 0.3, -0.1]])
U = torch.tensor([[1.0, 2.0, -1.0, 4.0]])
CHANNELS_W = torch.tensor([[0.9, -0.2, 0.05], [-0.4, 0.6, -0.1]])
CHANNELS_U = torch.tensor([[1.0, -1.0, 2.0], [3.0, 1.0, -2.0]])


def layer_of(weight: torch.Tensor) -> Context:
    """Return a phase of 100 steps on one linear layer with these weights."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[1].weight.data.copy_(weight)
    context = context_of(model, {}, image_size=1, channels=weight.shape[1])
    context.schedule = PhaseSchedule(10, 0.1, "constant", [], 0.1, 0.0, 0.0)
    return context


def set_up(weight: torch.Tensor, name: str = "autosparse", **options):
    """Return method and context; the gradient of every weight comes from `backward`."""
    context = layer_of(weight)
    method = make(name, **options)
    method.setup(context)
    return method, context


def backward(method, context: Context, gradient: torch.Tensor, step: int = 0) -> torch.Tensor:
    """Give dL/dw to the method and return what the optimizer gets for W."""
    weight = context.model[1].weight
    weight.grad = gradient.clone()
    assert method.after_backward(context, step)
    return weight.grad


# Worked examples


def test_forward_of_one_threshold():
    torch.testing.assert_close(shrink(W, torch.zeros(1, 1)), torch.tensor([[0.3, -0.1, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("alpha", "expected", "slope"),
    [(0.0, [1, 2, 0, 0], 0.25), (0.5, [1, 2, -0.5, 2], 0.875), (1.0, [1, 2, -1, 4], 1.5)],
)
def test_backward_of_one_threshold(alpha, expected, slope):
    method, context = set_up(W, threshold_init=0.0, alpha=alpha)
    torch.testing.assert_close(context.model[1].weight.data, torch.tensor([[0.3, -0.1, 0.0, 0.0]]))
    assert context.masks.counts() == {"1.weight": 2}
    assert torch.equal(backward(method, context, U), torch.tensor([expected], dtype=torch.float32))
    assert method.thresholds["1.weight"].grad.item() == pytest.approx(slope)
    assert torch.equal(context.model[1].weight.data, W), "the optimizer moves the raw weights"


@pytest.mark.parametrize(
    ("alpha", "second_row", "slopes"),
    [
        (0.0, [3, 1, 0], (-0.026592, 0.470007)),
        (0.25, [3, 1, -0.5], (-0.026592, 0.352506)),
        (1.0, [3, 1, -2], (-0.026592, 0.0)),
    ],
)
def test_one_threshold_per_channel(alpha, second_row, slopes):
    method, context = set_up(CHANNELS_W, granularity="channel", alpha=alpha)
    threshold = method.thresholds["1.weight"]
    assert threshold.shape == (2, 1)
    with torch.no_grad():
        threshold.copy_(torch.tensor([[-5.0], [-0.5]]))
        context.model[1].weight.copy_(CHANNELS_W)
    method.after_step(context, 0)
    expected = torch.tensor([[0.893307, -0.193307, 0.043307], [-0.022459, 0.222459, 0.0]])
    torch.testing.assert_close(context.model[1].weight.data, expected, atol=1e-6, rtol=0)
    gradient = backward(method, context, CHANNELS_U)
    assert torch.equal(gradient, torch.tensor([[1.0, -1.0, 2.0], second_row]))
    torch.testing.assert_close(threshold.grad, torch.tensor(slopes).view(2, 1), atol=1e-5, rtol=0)


def test_a_weight_exactly_at_its_threshold_counts_as_pruned():
    method, context = set_up(torch.tensor([[0.5, 0.7]]), threshold_init=0.0, alpha=0.3)
    assert context.masks.masks["1.weight"].tolist() == [[False, True]]
    torch.testing.assert_close(backward(method, context, torch.ones(1, 2)), torch.tensor([[0.3, 1.0]]))


def test_a_weight_of_exactly_zero_gets_no_gradient():
    """sign(0) is 0, whatever alpha is."""
    for alpha in (0.0, 0.3, 1.0):
        method, context = set_up(torch.tensor([[0.0, 0.7, -0.1, -0.0]]), threshold_init=-1.0, alpha=alpha)
        gradient = backward(method, context, torch.ones(1, 4))
        torch.testing.assert_close(gradient, torch.tensor([[0.0, 1.0, alpha, 0.0]]))


def test_fixed_budget():
    method, context = set_up(W, "autosparse_topk", sparsity=0.5, alpha=0.5, first_layer="sparse")
    torch.testing.assert_close(context.model[1].weight.data, torch.tensor([[0.8, -0.6, 0.0, 0.0]]))
    assert torch.equal(backward(method, context, U), torch.tensor([[1.0, 2.0, -0.5, 2.0]]))


# Invariants of the pure functions


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return W, u and T of three channels in double precision."""
    source = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(2, 3, 20, generator=source, dtype=torch.float64)
    return weight, gradient, torch.randn(3, 1, generator=source, dtype=torch.float64) - 1


def slopes(weight, gradient, threshold, alpha):
    """Return dL/dW and dL/dT as the method computes them."""
    kept = shrink(weight, threshold) != 0
    scaled = gradient * torch.where(kept, 1.0, alpha).double()
    return scaled, threshold_gradient(scaled, weight, threshold)


def numerical(weight, gradient, threshold, step=1e-6):
    """Return dL/dW and dL/dT of L = sum(u * w) by central differences."""
    found = []
    for tensor in (weight, threshold):
        slope = torch.zeros_like(tensor)
        for index in range(tensor.numel()):
            values = []
            for sign in (1, -1):
                moved = tensor.clone()
                moved.view(-1)[index] += sign * step
                pair = (moved, threshold) if tensor is weight else (weight, moved)
                values.append((gradient * shrink(*pair)).sum())
            slope.view(-1)[index] = (values[0] - values[1]) / (2 * step)
        found.append(slope)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_without_alpha_the_backward_pass_is_the_derivative(seed):
    weight, gradient, threshold = drawn(seed)
    assert ((weight.abs() - threshold.sigmoid()).abs() > 1e-4).all()
    for ours, theirs in zip(slopes(weight, gradient, threshold, 0.0), numerical(weight, gradient, threshold),
                            strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_with_alpha_it_is_not():
    weight, gradient, threshold = drawn(0)
    ours, theirs = slopes(weight, gradient, threshold, 0.5), numerical(weight, gradient, threshold)
    kept = shrink(weight, threshold) != 0
    torch.testing.assert_close(ours[0][kept], theirs[0][kept], atol=1e-6, rtol=1e-6)
    assert not theirs[0][~kept].any() and (ours[0][~kept] == 0.5 * gradient[~kept]).all()
    assert not torch.allclose(ours[1], theirs[1])


def test_forward_shrinks_and_keeps_signs():
    weight, _, threshold = drawn(3)
    effective = shrink(weight, threshold)
    assert (effective.abs() <= weight.abs()).all()
    assert ((effective == 0) | (effective.sign() == weight.sign())).all()
    density = [(shrink(weight, torch.tensor(t)) != 0).sum().item() for t in (-8.0, -3.0, -1.0, 0.0, 2.0)]
    assert density == sorted(density, reverse=True) and density[0] > density[-1]


def test_no_gradient_underflows_or_overflows_far_away():
    weight, gradient, _ = drawn(4)
    slope = threshold_gradient(gradient.float(), weight.float(), torch.full((1, 1), -3200.0))
    assert slope.item() == 0.0
    assert torch.equal(shrink(weight, torch.full((1, 1), -3200.0)), weight)


# Schedule

TABLE = {
    0: (1, 0.99753, 1), 1: (0.99975, 0.99721, 0.99975), 5: (0.99384, 0.9955, 0.9955), 10: (0.97553, 0.99184, 0.99184),
    25: (0.85355, 0.95257, 0.95257), 30: (0.79389, 0.91683, 0.91683), 40: (0.65451, 0.76852, 0.76852),
    50: (0.5, 0.5, 0.5), 60: (0.34549, 0.23148, 0.34549), 75: (0.14645, 0.04743, 0.14645),
    90: (0.02447, 0.00816, 0.02447), 100: (0, 0.00247, 0.00247),
}  # fmt: skip


@pytest.mark.parametrize("epoch", TABLE)
def test_schedule(epoch):
    found = [decline(shape, epoch / 100) for shape in ("cosine", "sigmoid", "sigmoid_cosine")]
    assert found == pytest.approx(TABLE[epoch], abs=5.1e-6)


def test_factor_of_an_epoch():
    options = {"alpha": 0.5, "epochs": 100, "compound": False}
    linear = [alpha_at(epoch, shape="linear", **options) for epoch in (0, 50, 99)]
    assert linear == pytest.approx([0.5, 0.25, 0.005])
    assert [alpha_at(epoch, shape="constant", **options) for epoch in (0, 99)] == [0.5, 0.5]
    assert alpha_at(0, shape="sigmoid_cosine", **options) == 0.5
    assert alpha_at(50, shape="sigmoid_cosine", **options) == 0.25


@pytest.mark.parametrize("compound", [False, True])
@pytest.mark.parametrize("shape", ["sigmoid_cosine", "cosine", "sigmoid", "linear", "constant"])
def test_factor_never_rises(shape, compound):
    found = [alpha_at(epoch, alpha=0.75, shape=shape, epochs=27, compound=compound) for epoch in range(27)]
    assert found == sorted(found, reverse=True) and found[0] == pytest.approx(0.75, rel=0.003)
    assert found[26] > 0


def test_compounding_factors():
    """After epochs 5, 10, ... the next one has what the product left; without compounding it is the epoch's value."""
    options = {"alpha": 0.5, "shape": "sigmoid_cosine", "epochs": 100}
    epochs = (5, 10, 20, 30, 40, 50)
    compound = [alpha_at(epoch + 1, **options, compound=True) for epoch in epochs]
    assert compound == pytest.approx([0.4941, 0.4782, 0.4045, 0.2348, 0.0432, 0.00038], abs=5.1e-5)
    plain = [alpha_at(epoch, **options, compound=False) for epoch in epochs]
    assert plain == pytest.approx([0.4978, 0.4959, 0.4867, 0.4584, 0.3843, 0.25], abs=5.1e-5)


def test_method_follows_the_schedule_and_then_needs_no_dense_gradient():
    """100 steps in epochs of 10, over which the schedule stretches; the cut-off is step 85, within an epoch."""
    method, context = set_up(W, alpha=0.5, schedule="linear", cutoff=0.85)
    assert method.alpha(0) == method.alpha(9) == 0.5
    assert method.alpha(10) == pytest.approx(0.45)
    assert method.alpha(84) == pytest.approx(0.1)
    assert [method.needs_dense_gradient(step) for step in (0, 84, 85, 99)] == [True, True, False, False]


def test_values_of_the_pquant_library():
    """100 epochs, alpha reset to 0 in epoch 90."""
    context = layer_of(W)
    context.total_steps, context.steps_per_epoch = 200, 2
    method = make("autosparse", alpha=0.5, compound=True, cutoff=0.9)
    method.setup(context)
    after = [method.alpha(2 * (epoch + 1)) for epoch in (30, 40, 50)]
    assert after == pytest.approx([0.2348, 0.0432, 0.00038], abs=5.1e-5)
    assert method.alpha(179) > 0 == method.alpha(180)


def test_the_cut_off_does_not_bend_the_schedule():
    early, late = (set_up(W, cutoff=cutoff)[0] for cutoff in (0.3, 1.0))
    assert [early.alpha(step) for step in range(30)] == [late.alpha(step) for step in range(30)]
    assert early.alpha(30) == 0 < late.alpha(99)


def test_set_up_says_when_alpha_ends():
    said: list[str] = []
    for cutoff in (0.9, 1.0):
        context = layer_of(W)
        context.report = said.append
        make("autosparse", cutoff=cutoff, threshold_init=-5.0).setup(context)
    assert "T = -5" in said[0] and "alpha is 0 from step 90 of 100 on" in said[1]
    assert "above 0 in all 100 steps" in said[3] and "method.cutoff" in said[3]


# Steps of an optimizer

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "fused sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_thresholds_are_in_the_optimizer_without_weight_decay(kind, granularity):
    context = layer_of(CHANNELS_W)
    context.optimizer = OPTIMIZERS[kind](list(context.model.parameters()))
    method = make("autosparse", granularity=granularity, threshold_init=-1.0)
    method.setup(context)
    weights, thresholds = context.optimizer.param_groups
    assert (weights["weight_decay"], thresholds["weight_decay"]) == (0.1, 0.0)
    assert thresholds["lr"] == weights["lr"] and thresholds["fused"] == weights["fused"]
    backward(method, context, torch.zeros_like(CHANNELS_W))
    context.optimizer.step()
    threshold = method.thresholds["1.weight"]
    assert threshold.dtype == torch.float32
    assert torch.equal(threshold.detach(), torch.full_like(threshold, -1.0)), "no gradient, no decay: it stays"
    backward(method, context, CHANNELS_U)
    context.optimizer.step()
    assert (threshold != -1).all()


def test_steps_are_those_of_autograd():
    """Three steps of SGD on a least-squares problem, weights and thresholds, against autograd at alpha 0."""
    source = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(8, 3, generator=source), torch.randn(8, 2, generator=source)
    method, context = set_up(CHANNELS_W, alpha=0.0, threshold_init=-1.0, granularity="channel")
    context.optimizer.state.clear()
    weight = CHANNELS_W.clone().requires_grad_()
    threshold = torch.full((2, 1), -1.0, requires_grad=True)
    reference = torch.optim.SGD([weight, threshold], lr=0.1, momentum=0.9)
    for step in range(3):
        for optimizer in (reference, context.optimizer):
            optimizer.zero_grad()
        effective = weight.sign() * (weight.abs() - threshold.sigmoid()).relu()
        (inputs @ effective.t() - targets).square().sum().backward()
        reference.step()
        (context.model(inputs) - targets).square().sum().backward()
        method.after_backward(context, step)
        context.optimizer.step()
        method.after_step(context, step)
        torch.testing.assert_close(method.raw["1.weight"], weight.detach())
        torch.testing.assert_close(method.thresholds["1.weight"].detach(), threshold.detach())
    assert not torch.allclose(threshold.detach(), torch.full((2, 1), -1.0))


def test_raw_weights_survive_a_skipped_step():
    """Under fp16 an overflow skips the optimizer's step."""
    method, context = set_up(W, threshold_init=0.0)
    backward(method, context, torch.full_like(W, torch.inf))
    method.after_step(context, 0)
    assert torch.equal(method.raw["1.weight"], W)
    torch.testing.assert_close(context.model[1].weight.data, torch.tensor([[0.3, -0.1, 0.0, 0.0]]))


def test_pruned_weights_without_gradient_stay_and_with_it_return():
    for alpha, expected in ((0.0, 2), (1.0, 4)):
        method, context = set_up(W, threshold_init=0.0, alpha=alpha, cutoff=1.0)
        context.optimizer = torch.optim.SGD(context.model.parameters(), lr=0.1)
        for step in range(5):
            backward(method, context, -W.sign(), step)  # every weight is wanted larger
            context.optimizer.step()
            method.after_step(context, step)
        assert context.masks.counts() == {"1.weight": expected}
        assert context.forward_macs == expected
        if not alpha:
            assert torch.equal(method.raw["1.weight"][0, 2:], W[0, 2:])


# Fewer gradients


def test_backward_density():
    method, context = set_up(W, threshold_init=0.0, alpha=0.5, backward_density=0.75)
    assert torch.equal(backward(method, context, U), torch.tensor([[1.0, 2.0, -0.5, 0.0]]))
    assert method.thresholds["1.weight"].grad.item() == pytest.approx(-0.25 * (1 - 2 - 0.5))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_kept_weights_get_their_gradients_whatever_the_backward_density(share):
    """Two of four are kept; at or below that, none of the pruned ones is trained."""
    method, context = set_up(W, threshold_init=0.0, alpha=0.5, backward_density=share)
    assert torch.equal(backward(method, context, U), torch.tensor([[1.0, 2.0, 0.0, 0.0]]))
    assert method.weight_gradient_macs(context, 0) == context.forward_macs == 2


def test_backward_density_follows_each_channels_threshold():
    """|W| - g(T) of the pruned ones: 0.4 - 0.5 in row 1, 0.1 - 0.119 in row 2, so the smaller weight is nearer."""
    method, context = set_up(torch.tensor([[0.9, 0.4], [0.6, 0.1]]), granularity="channel", threshold_init=-2.0,
                             alpha=0.5, backward_density=0.75)  # fmt: skip
    with torch.no_grad():
        method.thresholds["1.weight"].copy_(torch.tensor([[0.0], [-2.0]]))
        context.model[1].weight.copy_(torch.tensor([[0.9, 0.4], [0.6, 0.1]]))
    method.after_step(context, 0)
    assert torch.equal(backward(method, context, torch.ones(2, 2)), torch.tensor([[1.0, 0.0], [1.0, 0.5]]))


def test_cost_of_the_backward_density():
    """2 f_S + b f_D while alpha is above 0, then 3 f_S; a layer whose density exceeds b costs what it keeps."""
    method, context = set_up(W, threshold_init=0.0, backward_density=0.75)
    assert [method.weight_gradient_macs(context, step) for step in (0, 89, 90)] == [3, 3, None]
    context.model[1].weight.data.fill_(0.9)
    method.after_step(context, 7)
    assert method.weight_gradient_macs(context, 8) == 4


def test_run_with_a_backward_density_below_the_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    forward, spent = [], []

    def look(training: TrainState, step: int) -> None:
        forward.append(training.context.forward_macs)
        spent.append(training.context.cost.total)

    watch(monkeypatch, look)
    finish(configure(tmp_path, "autosparse", "method.threshold_init=-4", "method.threshold_decay=0",
                     "method.backward_density=0.01"))
    assert [b - a for a, b in zip(spent, spent[1:], strict=False)] == [8 * 3 * macs for macs in forward[:-1]]


# Bad ends


def test_a_layer_without_weights_stops_the_run_by_name():
    with pytest.raises(UserError, match=r"^1 has no weight left at the start.*method\.threshold_init"):
        set_up(0.5 * W, threshold_init=0.0)
    method, context = set_up(W, threshold_init=0.0)
    context.model[1].weight.data.fill_(0.1)
    method.after_step(context, 18)  # looked for now and then only: the host waits for the answer
    with pytest.raises(UserError, match=r"^1 has no weight left after step 19.*threshold 0\.5"):
        method.after_step(context, 19)
    with pytest.raises(UserError, match=r"^1 has no weight left after epoch 1"):
        method.end_epoch(context, 0)


def test_nothing_pruned_is_said():
    method, context = set_up(W, threshold_init=-9.0)
    said: list[str] = []
    context.report = said.append
    method.end_epoch(context, 8)
    assert said == []
    method.end_epoch(context, 9)
    assert len(said) == 1 and said[0].startswith("nothing was pruned")


BAD = {
    "method.alpha=1.5": "method.alpha must lie in [0, 1]",
    "method.alpha=-0.1": "method.alpha must lie in [0, 1]",
    "method.cutoff=1.1": "method.cutoff must lie in (0, 1]",
    "method.cutoff=0": "method.cutoff must lie in (0, 1]",
    "method.backward_density=0": "method.backward_density must lie in (0, 1]",
    "method.threshold_init=0.5": "method.threshold_init must lie in (-inf, 0]",
    "method.threshold_decay=0.01": "method.threshold_decay=0.01 pushes T towards 0",
    "method.granularity=weight": "method.granularity=weight is not allowed",
    "method.schedule=step": "method.schedule=step is not allowed",
    "method.sparsity=0.8": "unknown option method.sparsity: the sparsity is an outcome of trained thresholds",
    "+method.sparsity=0.8": "is not offered; for an exact budget take method=autosparse_topk; allowed",
    "method.exclude=[fc9]": "method.exclude: 'fc9' matches no layer",
    "method.threshold_init=-20": "method.threshold_init=-20 with method.threshold_decay=0 never brings T to -10",
}


@pytest.mark.parametrize("option", BAD)
def test_bad_input_is_one_line(option: str, capsys: pytest.CaptureFixture, tmp_path: Path):
    assert cli.main(["method=autosparse", option, "dataset=fake", f"output_dir={tmp_path}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert BAD[option] in line
    assert not list(tmp_path.iterdir())


# Runs


def test_run_leaves_the_effective_network(tmp_path: Path):
    folder = finish(configure(tmp_path, "autosparse", "method.threshold_init=-4", "method.threshold_decay=0"))
    result, written = last_result(folder), summary(folder)
    state, thresholds = result["method"], result["method"]["thresholds"]
    assert set(state["raw"]) == set(thresholds) == set(result["masks"])
    for name, raw in state["raw"].items():
        expected = raw.sign() * (raw.abs() - thresholds[name].sigmoid()).relu()
        torch.testing.assert_close(result["model"][name], expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(result["model"][name] != 0, result["masks"][name])
    total = sum(mask.numel() for mask in result["masks"].values())
    kept = sum(int(mask.sum()) for mask in result["masks"].values())
    assert written["sparsity/requested"] is None and written["sparsity/achieved"] == 1 - kept / total > 0
    assert written["params/nonzero"] == written["params/total"] - total + kept


def test_records_hold_alpha_and_thresholds(tmp_path: Path):
    config = configure(tmp_path, "autosparse", "method.threshold_init=-4", "method.threshold_decay=0",
                       "method.cutoff=0.5")
    finish(config)
    rows = [json.loads(line) for line in (run_folder(config) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "alpha" in row]
    assert [row["alpha"] for row in rows][1:] == [0, 0] and rows[0]["alpha"] == 0.75
    assert rows[0]["threshold/conv1"] != rows[2]["threshold/conv1"]
    assert 0.015 < rows[0]["threshold/conv1"] < 0.02  # sigmoid(-4) is 0.018
    assert 0 < rows[2]["mask/density/conv1"] <= 1


def test_cost_counts_the_dense_gradient_while_alpha_is_above_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """2 f_S + f_D, then 3 f_S, with the density of each step."""
    forward, spent = [], []

    def look(training: TrainState, step: int) -> None:
        forward.append(training.context.forward_macs)
        spent.append(training.context.cost.total)
        dense.append(training.context.dense_macs)

    dense: list[int] = []
    watch(monkeypatch, look)
    finish(configure(tmp_path, "autosparse", "method.threshold_init=-4", "method.threshold_decay=0",
                     "method.cutoff=0.5"))
    for step in range(1, 9):
        last = dense[0] if step < 4.5 else forward[step - 1]
        assert spent[step] - spent[step - 1] == 8 * (2 * forward[step - 1] + last)
    assert len(set(forward)) > 1


@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_fixed_budget_is_exact_after_every_step(
    distribution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen, moved = [], []

    def look(training: TrainState, step: int) -> None:
        zeros = sum(int((training.context.parameters()[name] == 0).sum()) for name in training.method.raw)
        seen.append((training.context.masks.num_kept, training.context.masks.num_weights - zeros))
        moved.append(training.context.masks.digest())

    watch(monkeypatch, look)
    finish(configure(tmp_path, "autosparse_topk", f"method.distribution={distribution}"))
    assert len(set(seen)) == 1 and seen[0][0] == seen[0][1]
    assert len(set(moved)) > 1
