"""One-shot magnitude pruning: exact selection per layer or over all layers, then fine-tuning under fixed masks."""

from __future__ import annotations

import torch
from torch import nn

from prune_lab.foundations import checkpoint
from tests.helpers.method_runs import configure, finish, last_result, make, summary, watch
from tests.helpers.toys import OneLayer, mask_of, open_phase

# set_snfs_gmp.md section 12
WEIGHT = torch.tensor([[0.5, -0.1, 0.3, 0.05, -0.7, 0.2, 0.2, 0.0]])


def magnitude(**changes):
    return make("magnitude", **{"sparsity": 0.5, "first_layer": "sparse"} | changes)


def test_hand_example_with_a_tie() -> None:
    for distribution in ("uniform", "global"):
        method = magnitude(distribution=distribution)
        context = open_phase(OneLayer(WEIGHT), method)
        method.prune(context)
        assert mask_of(context) == [[1, 0, 1, 0, 1, 1, 0, 0]]
        expected = WEIGHT * torch.tensor(mask_of(context))
        assert torch.equal(context.parameters()["fc.weight"].detach(), expected)


def two_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False), nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(1, 25).view(2, 12) / 100)  # 0.01 ... 0.24
        model[2].weight.copy_(torch.arange(1, 7).view(3, 2) / 10)  # 0.1 ... 0.6
    return model


def test_global_ranks_over_layers_and_local_within_them() -> None:
    counts = {}
    for distribution in ("global", "uniform"):
        method = magnitude(distribution=distribution)
        context = open_phase(two_layers(), method)
        method.prune(context)
        counts[distribution] = context.masks.counts()
    # The 15 largest of all 30: 0.6 ... 0.2 (five), then 0.24 ... 0.15; half of each layer otherwise.
    assert counts["global"] == {"1.weight": 10, "2.weight": 5}
    assert counts["uniform"] == {"1.weight": 12, "2.weight": 3}


def test_first_layer_and_exclusions_stay_dense() -> None:
    method = magnitude(distribution="uniform", first_layer="auto")
    context = open_phase(two_layers(), method)
    method.prune(context)
    assert context.masks.counts() == {"2.weight": 3}
    method = magnitude(distribution="global", exclude=["2"])
    context = open_phase(two_layers(), method)
    method.prune(context)
    assert context.masks.counts() == {"1.weight": 12}


def test_chain_cuts_the_trained_network_and_keeps_its_masks(tmp_path, monkeypatch) -> None:
    digests: dict[str, set] = {}

    def look(training, step: int) -> None:
        masks = training.context.masks
        digests.setdefault(training.context.phase, set()).add(None if masks is None else masks.digest())

    watch(monkeypatch, look)
    folder = finish(configure(tmp_path, "magnitude"))
    assert digests["train"] == {None} and len(digests["finetune"]) == 1 and None not in digests["finetune"]
    dense, cut, _ = [checkpoint.load(path / "result.pt") for path in sorted((folder / "phases").iterdir())]
    for name, mask in cut["masks"].items():
        assert torch.equal(cut["model"][name], dense["model"][name] * mask)
    flat = {name: dense["model"][name].abs() for name in cut["masks"]}
    kept = torch.cat([flat[name][mask] for name, mask in cut["masks"].items()])
    gone = torch.cat([flat[name][~mask] for name, mask in cut["masks"].items()])
    assert kept.min() >= gone.max()
    assert all(torch.equal(mask, last_result(folder)["masks"][name]) for name, mask in cut["masks"].items())


def test_dense_phase_is_trained_once_for_all_sparsities(tmp_path) -> None:
    first = summary(finish(configure(tmp_path, "magnitude", "method.sparsity=0.5")))
    config = configure(tmp_path, "magnitude", "method.sparsity=0.9")
    from prune_lab.pipeline import runner

    assert runner.run(config) == 0
    (second,) = [summary(path.parent) for path in tmp_path.glob("*/summary.json")
                 if summary(path.parent)["sparsity/requested"] == 0.9]  # fmt: skip
    assert [phase["reused"] for phase in first["phases"]] == [False, False, False]
    assert [phase["reused"] for phase in second["phases"]] == [True, False, False]
    assert first["phases"][0]["key"] == second["phases"][0]["key"]
