"""Exact selections, drop and grow, and the set of masks over a network."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from prune_lab.foundations.seeding import generator
from prune_lab.pruning.masks.mask_set import MaskSet
from prune_lab.pruning.masks.top_k import grow, keep_by_sign, keep_top, keep_top_global, random_mask, ranks

# rigl.md example B
WEIGHT = torch.tensor([[0.9, -0.1, 0, 0], [0.05, 0.4, 0, -0.7], [0, 0, 0.2, 0.3]])
GRADIENT = torch.tensor([[0.1, 0.2, 0.8, -0.3], [-0.9, 0.05, 0.1, 0.4], [0.6, -0.2, 0.3, 0]])


def sorted_reference(score: Tensor, num_keep: int, candidates: Tensor) -> Tensor:
    """Return what a stable sort of (score descending, index ascending) over the candidates keeps."""
    flat, allowed = score.reshape(-1).tolist(), candidates.reshape(-1).tolist()
    order = sorted((index for index in range(len(flat)) if allowed[index]), key=lambda index: (-flat[index], index))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[:num_keep]] = True
    return mask.view(score.shape)


def drop_and_grow(weight: Tensor, mask: Tensor, score: Tensor, num_move: int) -> tuple[Tensor, Tensor]:
    """Return (kept, new mask) of one update with the program's two selections."""
    count = int(mask.sum())
    kept = keep_top(weight.abs(), count - num_move, candidates=mask)
    return kept, grow(kept, score, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("restricted", [False, True])
def test_keep_top_equals_a_stable_sort(dtype, restricted):
    draw = generator(0, "keep_top")
    score = torch.randint(-4, 5, (3, 5, 2, 2), generator=draw).to(dtype)  # many ties, both zeros
    candidates = torch.rand(score.shape, generator=draw) < (0.5 if restricted else 2)
    for num_keep in range(int(candidates.sum()) + 1):
        mask = keep_top(score, num_keep, candidates=candidates if restricted else None)
        assert torch.equal(mask, sorted_reference(score, num_keep, candidates))


def test_keep_top_orders_infinities_and_both_zeros():
    score = torch.tensor([-torch.inf, -0.0, 0.0, torch.inf, -1.0])
    assert keep_top(score, 1).tolist() == [False, False, False, True, False]
    assert keep_top(score, 2).tolist() == [False, True, False, True, False]
    assert keep_top(score, 4).tolist() == [False, True, True, True, True]


def test_keep_top_does_not_depend_on_the_memory_format():
    score = torch.randint(0, 3, (4, 3, 3, 3), generator=generator(0, "format")).float()
    last = score.to(memory_format=torch.channels_last)
    candidates = (score > 0).to(memory_format=torch.channels_last)
    assert torch.equal(keep_top(score, 40), keep_top(last, 40))
    assert torch.equal(keep_top(score, 20, candidates=score > 0), keep_top(last, 20, candidates=candidates))


def test_keep_top_accepts_parameters_and_leaves_inputs_alone():
    weight = nn.Parameter(WEIGHT.clone())
    candidates = WEIGHT != 0
    keep_top(weight.abs(), 3, candidates=candidates)
    assert torch.equal(weight, WEIGHT) and torch.equal(candidates, WEIGHT != 0)


def test_keep_top_refuses_nan_among_candidates_only():
    score = torch.tensor([1.0, torch.nan, 2.0])
    for nan in (score, -score):  # whatever the sign of NaN
        with pytest.raises(ValueError, match="NaN"):
            keep_top(nan, 1)
    assert keep_top(score, 1, candidates=~score.isnan()).tolist() == [False, False, True]


MIXED_THREADS = """
import torch
torch.set_num_threads(2)
torch.ones(1 << 22).mul_(2)  # worker threads begin here, and go on as they began
torch.set_flush_denormal(True)
from prune_lab.pruning.masks import semi_structured
from prune_lab.pruning.masks.top_k import keep_top
bits = torch.arange(1, 3 * 2**18 + 1, dtype=torch.int32)
scores = torch.cat([torch.linspace(1, 2, 2**18), bits.view(torch.float32)])
mask = keep_top(scores, 2**19)
wanted = (torch.arange(2**20) < 2**18) | (torch.arange(2**20) >= 3 * 2**18)
pairs = semi_structured.keep_top(scores[2**18:].view(3, 2**18), 3 * 2**17).view(-1, 4)  # rising in each group
print(int(mask.sum()), torch.equal(mask, wanted), int(pairs.sum()), bool(pairs[:, 2:].all()))
"""


def test_keep_top_is_exact_where_threads_differ_in_flushing_denormals():
    command = [sys.executable, "-c", MIXED_THREADS]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.stdout.split() == ["524288", "True", "393216", "True"], done.stderr


def test_denormal_scores_are_told_apart():
    tiny = torch.tensor([1, 1 - 2**31, 3, 0, -(2**31)], dtype=torch.int32).view(torch.float32)  # 1.4e-45, ..., -0.0
    assert keep_top(tiny, 2).tolist() == [True, False, True, False, False]
    assert ranks(tiny).tolist() == [1, -1, 3, 0, 0]
    assert ranks(torch.tensor([-torch.inf, torch.inf])).tolist() == [-0x7F800000, 0x7F800000]


@pytest.mark.parametrize("num_keep", [-1, 3])
def test_keep_top_refuses_impossible_counts(num_keep):
    with pytest.raises(ValueError, match=f"cannot keep {num_keep} of 2 candidates"):
        keep_top(torch.zeros(3), num_keep, candidates=torch.tensor([True, True, False]))


def test_gmp_mask_example():
    weight = torch.tensor([0.5, -0.1, 0.3, 0.05, -0.7, 0.2, 0.2, 0.0])
    assert keep_top(weight.abs(), 4).int().tolist() == [1, 0, 1, 0, 1, 1, 0, 0]


def test_global_selection_is_one_selection_over_all_layers():
    draw = generator(0, "global")
    scores = {name: torch.randint(0, 6, shape, generator=draw).float() for name, shape in (("b", (4, 5)), ("a", (30,)))}
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    for num_keep in (0, 1, 17, 50):
        masks = keep_top_global(scores, num_keep)
        assert list(masks) == ["b", "a"] and masks["b"].shape == (4, 5)
        assert torch.equal(torch.cat([mask.reshape(-1) for mask in masks.values()]), keep_top(flat, num_keep))
    candidates = {name: score > 2 for name, score in scores.items()}
    masks = keep_top_global(scores, 10, candidates=candidates)
    assert sum(int(mask.sum()) for mask in masks.values()) == 10
    assert not any(bool((mask & ~candidates[name]).any()) for name, mask in masks.items())


def test_random_masks_are_exact_repeatable_and_even():
    masks = [random_mask((4, 5), 7, generator(0, "mask", index)) for index in range(2000)]
    assert all(int(mask.sum()) == 7 for mask in masks)
    assert torch.equal(masks[3], random_mask((4, 5), 7, generator(0, "mask", 3)))
    frequency = torch.stack(masks).double().mean(0)
    assert float((frequency - 7 / 20).abs().max()) < 5 * (0.35 * 0.65 / 2000) ** 0.5  # five standard deviations


def test_rigl_update_example_b():
    mask = WEIGHT != 0
    kept, new = drop_and_grow(WEIGHT, mask, GRADIENT.abs(), int(0.3 * 7))
    assert (mask & ~kept).nonzero().tolist() == [[0, 1], [1, 0]]
    assert new.int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 1, 1]]
    assert (new & ~mask).nonzero().tolist() == [[0, 2]]


def test_rigl_example_d_average_before_absolute_value():
    local = torch.tensor([[1.0, 0.6], [-1.0, 0.6]])
    none = torch.zeros(2, dtype=torch.bool)
    assert grow(none, local.mean(0).abs(), 1).tolist() == [False, True]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("density", [0.05, 0.5, 0.95])
def test_update_invariants(fraction, density):
    draw = generator(0, "update", fraction, density)
    mask = random_mask((6, 5, 3, 3), round(270 * density), draw)
    weight = torch.randn(mask.shape, generator=draw) * mask
    score = torch.rand(mask.shape, generator=draw)
    num_move = int(fraction * int(mask.sum()))
    kept, new = drop_and_grow(weight, mask, score, num_move)
    dropped, grown = mask & ~kept, new & ~kept
    assert int(new.sum()) == int(mask.sum())
    assert int((mask & ~new).sum()) == int((new & ~mask).sum()) <= num_move
    assert int(dropped.sum()) == int(grown.sum()) == num_move
    if fraction == 0:
        assert torch.equal(new, mask)
    if num_move and bool(kept.any()):
        assert float(weight.abs()[kept].min()) >= float(weight.abs()[dropped].max())
    if num_move and not bool(new.all()):
        assert float(score[grown].min()) >= float(score[~new].max())


def test_a_full_layer_stays_full():
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert drop_and_grow(WEIGHT, mask, GRADIENT.abs(), 5)[1].all()


def test_set_by_sign_example():
    values = torch.tensor([-0.9, -0.5, -0.2, -0.1, 0, 0, 0, 0.1, 0.3, 0.6, 1.0])
    kept = keep_by_sign(values, values != 0, 0.3)
    assert values[(values != 0) & ~kept].tolist() == pytest.approx([-0.1, 0.1])
    assert torch.equal(kept, keep_top(values.abs(), 6, candidates=values != 0))  # RigL's rule drops the same two here


def test_set_by_sign_takes_its_share_on_each_side():
    values = torch.tensor([-9.0, -8, -7, -6, 1, 2, 3, 4, 5, 6])
    kept = keep_by_sign(values, torch.ones(10, dtype=torch.bool), 0.5)
    assert values[kept].tolist() == [-9, -8, 4, 5, 6]
    assert not bool((kept & (values == 0)).any())


# --- MaskSet ---------------------------------------------------------------------------------------------------------


def conv_and_linear(memory_format: torch.memory_format = torch.contiguous_format) -> tuple[nn.Module, MaskSet]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)).to(memory_format=memory_format)
    named = {name: weight for name, weight in model.named_parameters() if name.endswith("weight")}
    masks = {name: random_mask(tuple(weight.shape), 3, generator(0, name)) for name, weight in named.items()}
    return model, MaskSet(named, masks)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_apply_zeroes_exactly_the_pruned_weights(memory_format):
    model, masks = conv_and_linear(memory_format)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    masks.apply()
    for name, weight in model.named_parameters():
        mask = masks.masks.get(name, torch.ones_like(weight, dtype=torch.bool))
        assert torch.equal(weight.detach(), torch.where(mask, before[name], 0.0))
        assert mask.stride() == weight.stride()  # one fused pass needs one memory format


def test_counts_follow_replacement():
    model, masks = conv_and_linear()
    assert masks.counts() == {"0.weight": 3, "2.weight": 3}
    assert (masks.num_kept, masks.num_weights, masks.density) == (6, 116, 6 / 116)
    masks.counts()["0.weight"] = 99  # a copy: callers cannot spoil it
    masks.replace("0.weight", torch.ones(4, 3, 3, 3, dtype=torch.bool))
    assert masks.counts() == {"0.weight": 108, "2.weight": 3}
    assert all(type(count) is int for count in masks.counts().values())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_replacing_all_is_replacing_each(memory_format):
    masks, other = conv_and_linear(memory_format)[1], conv_and_linear(memory_format)[1]
    new = {"2.weight": random_mask((2, 4), 5, generator(1)), "0.weight": random_mask((4, 3, 3, 3), 9, generator(2))}
    masks.replace_all(new)
    for name, mask in new.items():
        other.replace(name, mask)
    assert masks.counts() == other.counts() == {"0.weight": 9, "2.weight": 5}
    assert list(masks.counts()) == list(masks.masks) == ["0.weight", "2.weight"]
    assert all(type(count) is int for count in masks.counts().values())
    assert masks.digest() == other.digest()
    assert [mask.stride() for mask in masks.masks.values()] == [mask.stride() for mask in other.masks.values()]
    for mask in new.values():
        mask.fill_(True)
    assert masks.digest() == other.digest(), "masks are copies"
    for wrong in ({"0.weight": new["0.weight"]}, new | {"v": new["2.weight"]}):
        with pytest.raises(ValueError, match="masks and parameters differ"):
            masks.replace_all(wrong)


def test_replacing_all_reads_nothing_and_counts_are_read_at_once(monkeypatch: pytest.MonkeyPatch):
    """A value read back from a GPU stalls it; int(), item() and tolist() do that."""
    _, masks = conv_and_linear()
    reads = []
    for name in ("tolist", "item", "__int__", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, original=original: reads.append(1) or original(tensor))
    halved = {name: mask & (torch.arange(mask.numel()).view(mask.shape) % 2 == 0) for name, mask in masks.masks.items()}
    masks.replace_all(halved)
    total = masks.kept.weighted_sum({"0.weight": 3, "2.weight": 5})
    assert reads == [] and total.dtype == torch.int64
    counts = masks.counts()
    assert len(reads) == 1
    assert masks.kept.weighted_sum({"0.weight": 3, "2.weight": 5}) == total.item()
    assert counts == masks.counts() == {name: int(mask.sum()) for name, mask in halved.items()}


def test_wrong_masks_are_refused():
    weight = nn.Parameter(torch.zeros(2, 3))
    good = torch.ones(2, 3, dtype=torch.bool)
    for masks in ({}, {"v": good}, {"w": good, "v": good}):
        with pytest.raises(ValueError, match="masks and parameters differ"):
            MaskSet({"w": weight}, masks)
    for mask in (good.float(), good.T, good.view(-1)):
        with pytest.raises(ValueError, match=r"mask of w must be bool of shape \(2, 3\)"):
            MaskSet({"w": weight}, {"w": mask})
    with pytest.raises(ValueError, match="no parameter v"):
        MaskSet({"w": weight}, {"w": good}).replace("v", good)


def test_masks_are_copies_and_state_restores_them():
    model, masks = conv_and_linear(torch.channels_last)
    state = {name: mask.clone() for name, mask in masks.state_dict().items()}
    digest = masks.digest()
    other = random_mask((4, 3, 3, 3), 9, generator(1))
    masks.replace("0.weight", other)
    other.fill_(True)
    assert masks.counts()["0.weight"] == int(masks.masks["0.weight"].sum()) == 9
    assert masks.digest() != digest
    masks.load_state_dict(state)
    assert masks.digest() == digest and masks.counts()["0.weight"] == 3
    with pytest.raises(ValueError, match="other parameters"):
        masks.load_state_dict({"0.weight": state["0.weight"]})
    with pytest.raises(ValueError, match="must be bool of shape"):
        masks.load_state_dict(state | {"2.weight": torch.ones(3, 3, dtype=torch.bool)})


def test_digest_is_the_same_in_every_memory_format():
    assert conv_and_linear()[1].digest() == conv_and_linear(torch.channels_last)[1].digest()


def test_masked_gradients_are_copies():
    model, masks = conv_and_linear()
    model(torch.randn(2, 3, 3, 3)).sum().backward()
    dense = model[0].weight.grad.clone()
    masked = masks.masked_grads()
    assert torch.equal(masked["0.weight"], dense * masks.masks["0.weight"])
    assert torch.equal(model[0].weight.grad, dense)  # growth scores need the gradients of pruned weights
    model[0].weight.grad = None
    assert list(masks.masked_grads()) == ["2.weight"]


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_zeroed_where_asked_and_only_there(name):
    model, masks = conv_and_linear()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 3, 3)).square().sum().backward()
        optimizer.step()
    weight, where = model[0].weight, masks.masks["0.weight"]
    before = {key: value.clone() for key, value in optimizer.state[weight].items()}
    masks.zero_state(optimizer, {"0.weight": where})
    touched = [key for key, value in optimizer.state[weight].items() if value.shape == weight.shape]
    assert len(touched) == {"sgd": 1, "adam": 3, "adamw": 2}[name]
    for key, value in optimizer.state[weight].items():
        expected = torch.where(where, 0.0, before[key]) if key in touched else before[key]
        assert torch.equal(value, expected)


def test_state_of_a_single_weight_is_zeroed_too():
    weight = nn.Parameter(torch.ones(1, 1))
    optimizer = OPTIMIZERS["adam"]([weight])
    weight.sum().backward()
    optimizer.step()
    everywhere = torch.ones(1, 1, dtype=torch.bool)
    MaskSet({"w": weight}, {"w": everywhere}).zero_state(optimizer, {"w": everywhere})
    assert float(optimizer.state[weight]["exp_avg"]) == 0
    assert float(optimizer.state[weight]["step"]) == 1


def test_unknown_optimizer_state_is_refused_and_missing_state_is_not():
    model, masks = conv_and_linear()
    optimizer = torch.optim.Adafactor(model.parameters())
    masks.zero_state(optimizer, masks.masks)  # before the first step there is none
    model(torch.randn(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"optimizer state row_var of 0\.weight has shape"):
        masks.zero_state(optimizer, masks.masks)
