"""Runs inside each process of a data-parallel test: small checks that all ranks must agree on. Holds no tests."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from prune_lab.core.context import Context
from prune_lab.core.method import Method, MethodConfig
from prune_lab.foundations import distributed
from prune_lab.training.loop import train_step
from tests.training.test_loop import batch, training


def joined_batch_norm(kind: type, shape: tuple[int, ...], **options) -> None:
    """Forward, gradients and running statistics equal those of one process with the joined batch."""
    torch.manual_seed(0)
    joined = torch.randn(*shape, dtype=torch.float64) * 3 + 1
    weights = torch.randn(*shape, dtype=torch.float64)
    reference = kind(shape[1], **options).double()
    work = distributed.join_batch_norm(nn.Sequential(kind(shape[1], **options).double()), torch.device("cpu"))
    if reference.affine:
        for module in (reference, work[0]):
            module.weight.data = torch.arange(1.0, shape[1] + 1).double()
            module.bias.data = torch.ones(shape[1]).double()
    half = shape[0] // 2
    mine = slice(distributed.rank() * half, (distributed.rank() + 1) * half)
    for _ in range(2):
        whole, part = joined.clone().requires_grad_(), joined[mine].clone().requires_grad_()
        expected, got = reference(whole), work(part)
        torch.testing.assert_close(got, expected[mine])
        (expected * weights).sum().backward()
        (got * weights[mine]).sum().backward()
        torch.testing.assert_close(part.grad, whole.grad[mine])
    for one, other in zip(work.parameters(), reference.parameters(), strict=True):
        dist.all_reduce(one.grad)
        torch.testing.assert_close(one.grad, other.grad)
    for one, other in zip(work.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    work.eval(), reference.eval()
    if reference.running_mean is not None:
        torch.testing.assert_close(work(joined), reference(joined))


def check_batch_norm() -> None:
    joined_batch_norm(nn.BatchNorm2d, (6, 3, 4, 5))
    joined_batch_norm(nn.BatchNorm1d, (6, 3))
    joined_batch_norm(nn.BatchNorm1d, (6, 3, 7))
    joined_batch_norm(nn.BatchNorm2d, (6, 3, 4, 5), momentum=None)
    joined_batch_norm(nn.BatchNorm2d, (6, 3, 4, 5), affine=False)
    joined_batch_norm(nn.BatchNorm2d, (6, 3, 4, 5), track_running_stats=False)


def check_masks_that_rounding_made_differ_become_those_of_the_first() -> None:
    first = torch.tensor([[True, False], [False, True]])
    mine = first if distributed.is_main() else ~first
    shared = distributed.share_masks({"w": mine})
    assert torch.equal(shared["w"], first) and shared["w"].dtype == torch.bool


def check_different_masks_are_noticed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    context = Context(model=model, costs=[], layers=[], phase="train", seed=0, total_steps=0, steps_per_epoch=0)
    context._count = lambda: 0
    mask = torch.ones(4, 3, 3, 3, dtype=torch.bool)
    context.install_masks({"0.weight": mask})
    mask[distributed.rank(), 0, 0, 0] = False
    try:
        context.install_masks({"0.weight": mask})
    except RuntimeError as error:
        assert "masks differ between processes" in str(error)
    else:
        raise AssertionError("different masks were not noticed")


class AbsGradient(Method):
    """Looks at what a method is given: the gradient of the joined batch (rigl.md, example D)."""

    def after_backward(self, context, step):
        self.seen = {name: parameter.grad.clone() for name, parameter in context.parameters().items()}
        return True


def check_gradients_are_averaged_before_a_method_sees_them() -> None:
    """Opposite gradients cancel: |mean| is 0 where the mean of |.| would be large."""
    model = nn.Linear(1, 1, bias=False)
    wrapped = distributed.parallel(model)
    sign = 1.0 if distributed.rank() == 0 else -1.0
    wrapped(torch.tensor([[sign * 3.0]])).sum().backward()
    assert float(model.weight.grad.abs()) == 0.0


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))


def check_accumulation_equals_the_joined_batch() -> None:
    """Two processes with two micro-batches each against one process with the whole batch."""
    rank, method = distributed.rank(), AbsGradient(MethodConfig("look"))
    model = network()
    work = training(Path(), model, "trainer.accumulate=2", method=method)
    work.forward = distributed.parallel(model)
    images, labels = batch()
    train_step(work, images[rank * 4:rank * 4 + 4], labels[rank * 4:rank * 4 + 4])
    reference = network()
    torch.nn.functional.cross_entropy(reference(images), labels).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(method.seen[name], parameter.grad, rtol=1e-5, atol=1e-7)
    assert work.context.cost.total == 8 * 3 * work.context.dense_macs  # all images of both processes


def check_buffers_follow_the_main_process() -> None:
    model = nn.BatchNorm2d(2)
    model.running_mean.fill_(float(distributed.rank() + 5))
    distributed.share_buffers(model)
    assert model.running_mean.tolist() == [5.0, 5.0]


def check_flags() -> None:
    cpu = torch.device("cpu")
    assert distributed.any_rank(distributed.rank() == 1, cpu)
    assert not distributed.any_rank(False, cpu)
    assert distributed.share({"rank": distributed.rank()}) == {"rank": 0}
    assert distributed.total(torch.tensor([1.0, 2.0])).tolist() == [2.0, 4.0]


def run_checks() -> int:
    """Run every check on this rank; the main process says which ones passed."""
    distributed.start(torch.device("cpu"))
    for name in CHECKS:
        globals()[name]()
        dist.barrier()
        if distributed.is_main():
            print(name, "passed")
    distributed.stop()
    return 0


CHECKS = [name for name in globals() if name.startswith("check_")]
